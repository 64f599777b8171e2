"""The main job on the embedded checkpoint: classify images, and compare the twin's numbers.

python examples/demo.py
"""

from __future__ import annotations

import time

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_flax import FlaxViTForImageClassification, ViTImageProcessor
from vit_torch import ViTForImageClassification
from vit_torch.parity import compare

ROUNDS = 50


def main() -> None:
    """Print a table of predictions, the twin's largest difference and the speed."""
    checkpoint, paths = embedded_checkpoint(), embedded_images()
    processor = ViTImageProcessor.from_pretrained(checkpoint)
    model = FlaxViTForImageClassification.from_pretrained(checkpoint, precision="highest")
    twin = ViTForImageClassification.from_pretrained(checkpoint)

    pixels = processor([Image.open(path) for path in paths], return_tensors="np")["pixel_values"]
    probabilities = np.asarray(jax.nn.softmax(model(pixels).logits, axis=-1))

    table = Table("image", "prediction", "probability", title="scikit-learn's handwritten digits")
    for path, row in zip(paths, probabilities, strict=True):
        best = int(row.argmax())
        table.add_row(path.name, model.config.id2label[best], f"{row[best]:.4f}")
    console = Console()
    console.print(table)

    report = compare(model, twin, pixels)
    logits = next(stage for stage in report.stages if stage.name == "logits")
    console.print(
        f"PyTorch twin: largest difference {report.largest.max_abs:.1e} over "
        f"{len(report.stages)} stages (at {report.largest.name}), logits {logits.max_abs:.1e}"
    )

    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(model(pixels))
        seconds.append(time.perf_counter() - start)
    console.print(
        f"Flax, jit-compiled: {len(paths) / np.median(seconds):.0f} images per second "
        f"(batch {len(paths)}, {jax.devices()[0].platform}, median of {ROUNDS})"
    )


if __name__ == "__main__":
    main()
