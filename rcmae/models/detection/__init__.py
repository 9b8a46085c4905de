"""Mask R-CNN (He et al., 2017) on a plain ViT: two backbones, one detector (`detector`)."""
