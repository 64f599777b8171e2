"""The checkpoint that ships with the package, and images to try it on.

A ViT of 77,530 parameters for handwritten digits, 8 x 8 pixels in grey, trained by
`examples/digits.py`; `digits/README.md` describes data, training and accuracy.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from vit_common.errors import MissingFileError


def embedded_checkpoint() -> Path:
    """The directory of the embedded checkpoint, for `from_pretrained` of both twins, `ViTConfig`
    and `ViTImageProcessor`.

    Raises:
        MissingFileError: this installation lacks it.
    """
    # `Path(str(...))`, as a package that was imported from a zip archive has no directory.
    directory = Path(str(importlib.resources.files("vit_common").joinpath("digits")))
    if not (directory / "config.json").is_file():
        raise MissingFileError(
            f"{directory}: the embedded checkpoint is not there; the package was installed without "
            "its data, or runs from an archive. Install it again, or name another model."
        )
    return directory


def embedded_images() -> list[Path]:
    """A dozen PNG files that the embedded checkpoint was not trained on, sorted by name; the name
    holds the digit: `digit-3-01.png`.

    Raises:
        MissingFileError: this installation lacks them.
    """
    directory = embedded_checkpoint() / "images"
    images = sorted(directory.glob("*.png"))
    if not images:
        raise MissingFileError(
            f"{directory}: the images of the embedded checkpoint are not there; the package was "
            "installed without its data. Install it again."
        )
    return images
