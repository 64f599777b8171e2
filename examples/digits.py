"""Train a small ViT from nothing on scikit-learn's handwritten digits, and save it.

    pip install ".[train]" scikit-learn
    python examples/digits.py --out digits
    vit predict digits/images --model digits

This made the checkpoint that the package ships (`vit_common/digits`; its README.md has the
figures). To fine-tune instead, begin with `FlaxViTForImageClassification.from_pretrained(name,
num_labels=K, ignore_mismatched_sizes=True)` and a learning rate a hundred times smaller.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vit_flax import FlaxViTForImageClassification, ViTConfig, ViTImageProcessor
from vit_flax.training import TrainState, cross_entropy, make_step

BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1

CONFIG = ViTConfig(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=96,
    image_size=8,
    patch_size=2,
    num_channels=1,
    encoder_stride=2,
    # The usual 0.02 is meant for widths of hundreds; at this one it learns several times slower.
    initializer_range=0.1,
    id2label={digit: str(digit) for digit in range(10)},
)

# The data were made by counting the ink of 4 x 4 blocks in scans of 32 x 32 pixels. A box filter
# does the same to a larger scan.
PROCESSOR = ViTImageProcessor(
    size=8, resample=Image.Resampling.BOX, image_mean=[0.5], image_std=[0.5]
)


def split(images, labels, test_size):
    """Two parts with the same share of each digit; always the same two."""
    return train_test_split(images, labels, test_size=test_size, random_state=0, stratify=labels)


@jax.jit
def augment(key, pixel_values):
    """Each image (B, 1, 8, 8) a little turned, scaled, sheared and shifted."""
    B, _, H, W = pixel_values.shape
    draws = jax.random.uniform(key, (6, B), minval=-1.0, maxval=1.0)
    angle, shear = jnp.deg2rad(10.0) * draws[0], 0.1 * draws[1]
    rows, columns = 1.0 + 0.1 * draws[2], 1.0 + 0.1 * draws[3]
    matrix = jnp.array(
        [
            [jnp.cos(angle) * rows, shear - jnp.sin(angle)],
            [jnp.sin(angle), jnp.cos(angle) * columns],
        ]
    )  # (2, 2, B)
    centre = jnp.array([H - 1, W - 1])[:, None, None] / 2
    grid = jnp.indices((H, W)) - centre  # (2, H, W)
    shift = 0.7 * draws[4:].T[:, :, None, None]  # (B, 2, 1, 1)
    source = jnp.einsum("ijb,jhw->bihw", matrix, grid) + centre + shift  # (B, 2, H, W)

    def sample(image, where):
        return map_coordinates(image, list(where), order=1, mode="constant", cval=-1.0)

    return jax.vmap(sample)(pixel_values[:, 0], source)[:, None]  # (B, 1, H, W)


def train(model, pixel_values, labels, epochs, seed):
    """The parameters after `epochs` over the images."""
    steps_per_epoch = len(labels) // BATCH_SIZE
    steps = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            weight_decay=WEIGHT_DECAY,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )

    step = make_step(model, cross_entropy(LABEL_SMOOTHING), optimizer)
    state = TrainState.create(model, optimizer)
    shuffle, key = np.random.default_rng(seed), jax.random.key(seed)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = shuffle.permutation(len(labels))[: steps_per_epoch * BATCH_SIZE]
        for batch in order.reshape(steps_per_epoch, BATCH_SIZE):
            key, now = jax.random.split(key)
            images = augment(now, pixel_values[batch])
            state, metrics = step(state, {"pixel_values": images, "labels": labels[batch]})
        if epoch % 10 == 0 or epoch == epochs:
            seconds = time.perf_counter() - start
            print(f"epoch {epoch}: loss {metrics['loss']:.3f}, {seconds:.0f} s", file=sys.stderr)
    return state.params


def main() -> None:
    """Train, score and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument(
        "--validate", action="store_true", help="train on 4/5 of the training part, score on 1/5"
    )
    args = parser.parse_args()

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (B, 8, 8), 0 to 16 -> 0 to 255
    images, test_images, labels, test_labels = split(images, digits.target, test_size=0.25)
    if args.validate:
        images, test_images, labels, test_labels = split(images, labels, test_size=0.2)

    model = FlaxViTForImageClassification(CONFIG, seed=args.seed)
    pixel_values = PROCESSOR(list(images), return_tensors="np")["pixel_values"]  # (B, 1, 8, 8)
    model.params = train(model, pixel_values, labels, args.epochs, args.seed)

    logits = model(PROCESSOR(list(test_images), return_tensors="np")["pixel_values"]).logits
    right = int(np.sum(np.argmax(logits, axis=-1) == test_labels))
    print(f"held-out accuracy: {right / len(test_labels):.4f} ({right} of {len(test_labels)})")

    model.save_pretrained(args.out)
    PROCESSOR.save_pretrained(args.out)
    (args.out / "images").mkdir(exist_ok=True)
    for number in range(12):
        digit, turn = number % 10, number // 10
        image = test_images[test_labels == digit][turn]
        Image.fromarray(image).save(args.out / "images" / f"digit-{digit}-{turn + 1:02d}.png")


if __name__ == "__main__":
    main()
