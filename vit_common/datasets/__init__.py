"""Data sets: images with labels from folders, tables and other libraries, and their order."""

from vit_common.datasets.folder import ImageFiles, ImageFolder
from vit_common.datasets.labelled import LabelledImages
from vit_common.datasets.open import open_images
from vit_common.datasets.order import epoch_order, occurrences, split

__all__ = [
    "ImageFiles",
    "ImageFolder",
    "LabelledImages",
    "epoch_order",
    "occurrences",
    "open_images",
    "split",
]
