"""A stand-in for NVIDIA apex with its documented signatures, for machines without it: plain
torch, no fused kernel.
"""
