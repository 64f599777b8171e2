"""Inference: images or names of image files in, labels with probabilities, features or attention
out."""

from vit_common.images.predictions import Prediction
from vit_flax.inference.classifier import ImageClassifier
from vit_flax.inference.encoder import ImageEncoder
from vit_flax.inference.preparer import Preparer
from vit_flax.inference.search import ImageIndex, Neighbour
from vit_flax.inference.stream import Result
from vit_flax.inference.zero_shot import ZeroShotClassifier

__all__ = [
    "ImageClassifier",
    "ImageEncoder",
    "ImageIndex",
    "Neighbour",
    "Prediction",
    "Preparer",
    "Result",
    "ZeroShotClassifier",
]
