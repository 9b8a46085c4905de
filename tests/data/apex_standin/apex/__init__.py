"""A stand-in for NVIDIA apex with its documented signatures, for machines without it. Plain torch inside: no fused kernel."""
