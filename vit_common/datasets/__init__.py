"""Data sets: images with labels from folders, tables and other libraries, and their order."""

from vit_common.datasets.folder import ImageFiles, ImageFolder
from vit_common.datasets.labelled import LabelledImages
from vit_common.datasets.objects import ImageObjects, as_images
from vit_common.datasets.open import open_images, part_names
from vit_common.datasets.order import epoch_order, occurrences, split
from vit_common.datasets.survey import check_images, survey
from vit_common.datasets.table import ImageTable

__all__ = [
    "ImageFiles",
    "ImageFolder",
    "ImageObjects",
    "ImageTable",
    "LabelledImages",
    "as_images",
    "check_images",
    "epoch_order",
    "occurrences",
    "open_images",
    "part_names",
    "split",
    "survey",
]
