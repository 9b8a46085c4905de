"""Remote shards on this node's disk, and reading samples by offset wherever they lie."""

from rcmae.data.cache.reader import Reader
from rcmae.data.cache.room import cache_problem, node_cache, open_bytes
from rcmae.data.cache.store import Cache, CacheTooSmall

__all__ = ["Cache", "CacheTooSmall", "Reader", "cache_problem", "node_cache", "open_bytes"]
