"""JPEG: what its markers say, its pixels or those of a part, and restart markers."""

from rcmae.data.jpeg.decoding import decode_box, decode_cmyk, decodes_parts
from rcmae.data.jpeg.markers import Box, Header, header, is_whole, scans
from rcmae.data.jpeg.restarts import (
    check_adds_restarts,
    has_restarts,
    restart_interval,
    with_restarts,
)
from rcmae.data.jpeg.turbo import library

__all__ = [
    "Box",
    "Header",
    "check_adds_restarts",
    "decode_box",
    "decode_cmyk",
    "decodes_parts",
    "has_restarts",
    "header",
    "is_whole",
    "library",
    "restart_interval",
    "scans",
    "with_restarts",
]
