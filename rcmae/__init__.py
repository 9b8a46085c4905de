"""Pretrain Vision Transformers by masked autoencoding with a teacher.

Read `rcmae/train.py` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcmae.weights.encoder import load_encoder

__version__ = "0.2.0"
__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":  # torch and timm cost seconds: only where it is used
        from rcmae.weights.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module 'rcmae' has no attribute {name!r}")
