"""Pretrain Vision Transformers by masked autoencoding with a teacher. Read `rcmae/train.py` first."""

__version__ = "0.1.0"
