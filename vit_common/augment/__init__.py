"""Augmentation of images before a network is trained on them, as timm and DeiT define it."""

from vit_common.augment.auto import auto_augment
from vit_common.augment.draws import draws
from vit_common.augment.pipeline import Augment

__all__ = ["Augment", "auto_augment", "draws"]
