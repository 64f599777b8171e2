"""Inference: images or names of image files in, labels with probabilities, features or attention
out."""

from vit_flax.inference.classifier import ImageClassifier, ImageEncoder, Prediction, Result

__all__ = ["ImageClassifier", "ImageEncoder", "Prediction", "Result"]
