"""Spatial domains shared by a whole cohort: graphs of cells, the model, and what is read from it.

Published models need torch (``cellquilt[domains]``); it is imported when one is asked for.
"""

from cellquilt.domains import analysis, metrics, plots
from cellquilt.domains.correction import batch_effect_correction
from cellquilt.domains.datasets import load_dataset
from cellquilt.domains.images import ImagePca, SlideImage, image_embeddings
from cellquilt.domains.model import Model
from cellquilt.spatial.tables import spatial_neighbors

__all__ = [
    "ImagePca",
    "Model",
    "SlideImage",
    "analysis",
    "batch_effect_correction",
    "image_embeddings",
    "load_dataset",
    "metrics",
    "plots",
    "spatial_neighbors",
]
