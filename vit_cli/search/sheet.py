"""A sheet of what a search found: a row for each photo, itself first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_common.errors import InputError, MissingFileError, ViTError

if TYPE_CHECKING:
    import PIL.Image

    from vit_flax.inference import Neighbour

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST = 100
"""Photos on one sheet."""
_SIDE, _LETTERS = 160, 10  # pixels
_GREY = (226, 226, 226)


def check(path: str, *, force: bool) -> None:
    """Refuse a name that no sheet can have, before the work.

    Raises:
        InputError: its suffix is of no kind that can be written.
        ExistingFileError, MissingFileError: it is there, or has no folder to be in.
    """
    from vit_common.files.replace import check_target

    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"--output must end in {', '.join(FORMATS)}; given {path!r}.")
    check_target(Path(path), force=force)


def check_count(photos: int) -> None:
    """Refuse more photos than one sheet takes.

    Raises:
        InputError: there are more.
    """
    if photos > MOST:
        raise InputError(
            f"--output draws at most {MOST} images and their neighbours; given {photos}."
        )


def find_file(name: str, beside: Path) -> Path | None:
    """Where an image of an index is: under its name, or under that beside the index."""
    for place in (Path(name), beside / name):
        try:
            if place.is_file():
                return place
        except (OSError, ValueError):  # a name that no file can have
            continue
    return None


def write(path: str, rows: Sequence[tuple[str, Sequence[Neighbour]]], *, beside: Path) -> list[str]:
    """Write the sheet.

    Args:
        path: its file.
        rows: photos and their neighbours.
        beside: folder that names of neighbours may be in.

    Returns:
        Names of images that are not there any more, or cannot be read; grey on the sheet.

    Raises:
        MissingFileError: the file cannot be written.
    """
    from vit_common.files.replace import replace_files
    from vit_common.files.texts import reason
    from vit_flax.inference.maps import contact_sheet

    tiles, captions, gone = [], [], []
    known: dict[str, Any] = {}

    def tile(name: str, place: Path | None) -> PIL.Image.Image:
        if name not in known:
            known[name] = _tile(place)
            if known[name] is None:
                gone.append(name)
        return known[name] or _empty()

    for file, near in rows:
        tiles.append(tile(file, Path(file)))
        captions.append(_cut(os.path.basename(file)))
        for each in near:
            tiles.append(tile(each.file, find_file(each.file, beside)))
            captions.append(_cut(os.path.basename(each.file), f"{each.similarity:.3f}  "))
    sheet = contact_sheet(tiles, 1 + len(rows[0][1]), captions, gap=6)
    target = Path(path)
    try:
        replace_files(
            target.parent,
            {target.name: lambda stream: sheet.save(stream, FORMATS[target.suffix.lower()])},
        )
    except OSError as error:
        raise MissingFileError(f"{target}: cannot be written ({reason(error)}).") from error
    return gone


def _tile(place: Path | None) -> PIL.Image.Image | None:
    """An image as a square of `_SIDE` pixels, or None where it cannot be read."""
    if place is None:
        return None
    try:
        image = small(place, _SIDE)
    except ViTError:
        return None
    square = _empty()
    square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    return square


def small(place: Path, side: int) -> PIL.Image.Image:
    """An image whose longer side has so many pixels.

    Raises:
        ViTError: it cannot be read.
    """
    import PIL.Image

    from vit_common.images.pictures import load_image

    image = load_image(place, at_least=(side, side)).convert("RGB")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = PIL.Image.Resampling.NEAREST if scale > 4 else PIL.Image.Resampling.LANCZOS
    return image.resize(size, smooth)


def _empty() -> PIL.Image.Image:
    import PIL.Image

    return PIL.Image.new("RGB", (_SIDE, _SIDE), _GREY)


def _cut(name: str, before: str = "") -> str:
    """A caption that fits under a tile: the middle of a long name is left out."""
    import PIL.ImageFont

    font = PIL.ImageFont.load_default(_LETTERS)
    name = "".join(c if c.isprintable() else "?" for c in name)
    text = before + name
    keep = len(name)
    while font.getlength(text) > _SIDE and keep > 4:
        keep -= 1
        text = f"{before}{name[: keep // 2]}…{name[len(name) - (keep - keep // 2) :]}"
    return text
