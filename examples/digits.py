"""Train a small ViT from nothing on scikit-learn's handwritten digits, by `vit train`.

    pip install ".[train]" scikit-learn
    python examples/digits.py --out digits
    vit predict digits/images --model digits

It writes the digits as a folder of images, a network with random weights, and runs

    vit train PHOTOS --model NETWORK --recipe digits --validation none --output RUN

`--photos DIR` keeps the first two there and prints the command instead. A network like this is the
checkpoint that the package ships (`vit_common/digits`; its README.md has the figures).
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vit_cli.main import main as vit
from vit_flax import FlaxViTForImageClassification, ViTConfig, ViTImageProcessor

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


def write_photos(folder, images, labels):
    """One folder for each digit."""
    for number, (image, digit) in enumerate(zip(images, labels, strict=True)):
        place = folder / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:04d}.png")


def main() -> None:
    """Train, score and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="directory to write the trained network into")
    where.add_argument("--photos", type=Path, help="only write photos and network, to this one")
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

    with tempfile.TemporaryDirectory() as scratch:
        place = args.photos or Path(scratch)
        photos, network, run = place / "photos", place / "network", place / "run"
        write_photos(photos / "train", images, labels)
        write_photos(photos / "test", test_images, test_labels)
        FlaxViTForImageClassification(CONFIG, seed=args.seed).save_pretrained(network)
        PROCESSOR.save_pretrained(network)
        command = ["train", str(photos), "--model", str(network), "--recipe", "digits"]
        command += ["--validation", "none", "--output", str(run)]
        command += ["--epochs", str(args.epochs), "--seed", str(args.seed)]
        if args.photos:
            print(shlex.join(["vit", *command]))
            return
        with contextlib.redirect_stdout(sys.stderr):
            code = vit(command)
        if code:
            sys.exit(code)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(network / name, args.out / name)
        shutil.copy(run / "model.safetensors", args.out / "model.safetensors")

    model = FlaxViTForImageClassification.from_pretrained(args.out)
    logits = model(PROCESSOR(list(test_images), return_tensors="np")["pixel_values"]).logits
    right = int(np.sum(np.argmax(logits, axis=-1) == test_labels))
    print(f"held-out accuracy: {right / len(test_labels):.4f} ({right} of {len(test_labels)})")
    (args.out / "images").mkdir(exist_ok=True)
    for number in range(12):
        digit, turn = number % 10, number // 10
        image = test_images[test_labels == digit][turn]
        Image.fromarray(image).save(args.out / "images" / f"digit-{digit}-{turn + 1:02d}.png")


if __name__ == "__main__":
    main()
