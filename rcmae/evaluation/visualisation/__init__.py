"""Pictures of what a network sees and does: what it reconstructs, where it attends, how its
features lie, what its first layer has learnt; and all pictures of a run on one page.

Of a run, a checkpoint or a file of any family; drawn by one process on the CPU."""

from rcmae.evaluation.visualisation.attended import attention
from rcmae.evaluation.visualisation.embedded import PLANES, features, principal_colours, umap
from rcmae.evaluation.visualisation.first_layer import filters
from rcmae.evaluation.visualisation.gallery import page
from rcmae.evaluation.visualisation.reconstructions import (
    NORMS,
    STATISTICS,
    norm_of,
    pasted,
    reconstruct,
)
from rcmae.evaluation.visualisation.sources import Images, Pictures

__all__ = [
    "NORMS",
    "PLANES",
    "STATISTICS",
    "Images",
    "Pictures",
    "attention",
    "features",
    "filters",
    "norm_of",
    "page",
    "pasted",
    "principal_colours",
    "reconstruct",
    "umap",
]
