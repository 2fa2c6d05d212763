"""What an aligned image shows around each cell: numbers of a network of images, one patch a cell."""

from cellquilt.domains.images.embeddings import image_embeddings
from cellquilt.domains.images.pca import ImagePca
from cellquilt.domains.images.slide_image import SlideImage

__all__ = ["ImagePca", "SlideImage", "image_embeddings"]
