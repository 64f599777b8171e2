"""What the tests of training runs share: a few pictures of three kinds, and a tiny network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vit_common.config import ViTConfig
from vit_common.datasets import LabelledImages
from vit_common.recipes import Recipe, recipe
from vit_flax import FlaxViTForImageClassification

CLASSES = {"dark": 60, "light": 190, "mid": 125}
SIDE = 8


def pictures(seed: int, each: int) -> LabelledImages:
    """So many noisy pictures of each class."""
    rng = np.random.default_rng(seed)
    arrays, labels = [], []
    for label, base in enumerate(CLASSES.values()):
        for _ in range(each):
            noise = rng.normal(base, 20, (SIDE, SIDE, 3))
            arrays.append(np.clip(noise, 0, 255).astype(np.uint8))
            labels.append(label)
    return LabelledImages(arrays, labels, classes=tuple(CLASSES))


def write_pictures(folder: Path, data: LabelledImages) -> Path:
    """The same as files in a folder for each class."""
    for i, label in enumerate(data.labels):
        path = folder / data.classes[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(data.image(i)).save(path)
    return folder


def tiny_config(**more: Any) -> ViTConfig:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": SIDE,
        "patch_size": 4,
        "num_labels": 5,
    }
    return ViTConfig(**{**sizes, **more})


def save_tiny(folder: Path, **more: Any) -> Path:
    """A checkpoint of a tiny network, for other classes than the pictures'."""
    FlaxViTForImageClassification(tiny_config(**more), seed=3).save_pretrained(folder)
    return folder


def short(**more: Any) -> Recipe:
    """A recipe for these pictures: a few steps, with everything that draws random numbers."""
    settings = {
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "mixup": 0.2,
        "ema": 0.8,
        "drop_path": 0.1,
    }
    return recipe("fine-tune", **{**settings, **more})


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log, without the times."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
