"""PIL images: any mode to 8 bits a channel, and files of images to PIL images.

Both the processor and the commands come through here, so a file read by a command and an image
opened by a user are converted alike.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from vit_common.errors import ImageError, InputError, MissingFileError, ViTError, shown
from vit_common.files.texts import reason
from vit_common.images import kinds

PLAIN_MODES = ("L", "LA", "RGB", "RGBA")
"""Modes whose bands are 8-bit intensities, with or without alpha; `load_image` gives these."""


# -- modes

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def convert_mode(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """A PIL image of any mode as mode L (`channels` 1), RGB (3) or RGBA (4).

    16-bit grey is scaled to 8 bits by 1/257 and rounded (Pillow alone cuts it off at 255), 32-bit
    integers likewise if they go beyond 255, floats from 0 to 1 by 255. Transparency is dropped,
    not blended, as in Pillow and Transformers. An image that has the mode already is returned as
    it is.

    Raises:
        ImageError: the values or the mode have no 8-bit meaning, or the file behind the image
            cannot be decoded.
    """
    if channels not in (1, 3, 4):
        raise ImageError(
            f"a PIL image of mode {image.mode} cannot be given {channels} channels; wanted 1, 3 "
            "or 4. Pass a numpy array for other numbers of channels."
        )
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if image.mode == mode:
        return image
    try:
        image = eight_bit(image)
        if image.mode == "LAB":  # the one space that Pillow takes to RGB only
            image = image.convert("RGB")
        return image if image.mode == mode else image.convert(mode)
    except ViTError:
        raise
    except (ValueError, OSError, SyntaxError) as error:
        raise ImageError(
            f"an image of mode {image.mode} cannot be converted to {mode}: {reason(error)}."
        ) from error


def eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """Modes whose stored numbers are no 8-bit intensities (depth, palette, premultiplied alpha)."""
    if image.mode == "1":
        return image.convert("L")
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bit(np.asarray(image))
    if image.mode == "I":
        values = np.asarray(image)
        low, high = value_range(values)
        if low < 0 or high > 65535:
            raise ImageError(
                f"an image of mode I (32-bit integers) must hold values from 0 to 65535; given "
                f"{low} to {high}. Scale it to 8 bits before."
            )
        # Pillow opens some 16-bit files as mode I: there the depth is known, however dark.
        if high > 255 or image.format in ("PNG", "PPM"):
            return _from_sixteen_bit(values)
        return image.convert("L")
    if image.mode == "F":
        values = np.asarray(image)
        low, high = value_range(values)
        if not (low >= 0 and high <= 255):
            raise ImageError(
                f"an image of mode F (floats) must hold values from 0 to 1 or from 0 to 255; given "
                f"{low} to {high}. Scale it to 8 bits before."
            )
        if high <= 1:
            return _by_rows(values, lambda rows: np.rint(rows * 255))
        return image.convert("L")
    if image.mode in ("P", "PA"):
        if not image.has_transparency_data:
            return image.convert("RGB")
        # Pillow warns if it must drop the transparency of a palette, so go by way of RGBA; and
        # from a copy, because that conversion writes into the palette of its source.
        image = image.copy()
        if not isinstance(image.info.get("transparency", 0), (int, bytes)):
            del image.info["transparency"]  # a colour that the palette need not have
        return image.convert("RGBA")
    if image.mode in ("La", "RGBa"):
        return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image


def _by_rows(values: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> PIL.Image.Image:
    """A grey image of what `change` makes of an array, some rows at a time: of an image of many
    megapixels the numbers in between would take several times its own memory."""
    out = np.empty(values.shape, np.uint8)
    count = max(1, _BLOCK // max(1, values.shape[1]))
    for start in range(0, len(values), count):
        out[start : start + count] = change(values[start : start + count])
    return PIL.Image.fromarray(out)


def _from_sixteen_bit(values: np.ndarray) -> PIL.Image.Image:
    return _by_rows(values, lambda rows: (rows.astype(np.uint32) + 128) // 257)


def value_range(values: np.ndarray) -> tuple[Any, Any]:
    return values.min().item(), values.max().item()


# -- files of images

_open_lock = threading.Lock()
_BLOCK = 1 << 20  # bytes that are read at once: a header and, of most files, all the rest

_TRANSPOSE = {  # EXIF orientation -> what puts the image upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_WITH_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def usual_workers(share: int = 1) -> int:
    """Threads to decode with: one for every `share` of the processor's cores, at most 16."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(16, max(1, cores // share))


def is_image_file(source: Any) -> bool:
    """Whether a value is the content of an image file, as bytes or open for reading."""
    return isinstance(source, (bytes, bytearray, memoryview)) or (
        hasattr(source, "read") and not isinstance(source, (PIL.Image.Image, np.ndarray))
    )


class _File(io.BufferedReader):
    """A file that is asked for no more bytes than it has.

    Pillow asks for as many as a chunk states, and Python makes room for them first.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _BLOCK:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def load_image(
    source: str | os.PathLike | bytes | BinaryIO | PIL.Image.Image,
    *,
    at_least: tuple[int, int] | None = None,
) -> PIL.Image.Image:
    """Read one image: decoded in full, upright, of mode L, LA, RGB or RGBA.

    The commands read images this way. `Image.open` alone ignores the EXIF orientation, so a photo
    may lie on its side. 16-bit grey is scaled to 8 bits as in `convert_mode`;
    palettes, CMYK and other colour spaces become RGB, or RGBA if they have transparency; the
    processors make of that what their model takes. The first frame of an animation is taken.
    Pillow's limit on pixels holds: it refuses images beyond twice `PIL.Image.MAX_IMAGE_PIXELS`,
    and nothing is said about those between once and twice.

    Args:
        source: path of the file; its content, as bytes or as a binary file that can seek, which is
            left open; or a PIL image.
        at_least: (height, width); a JPEG that is larger is decoded at a half, a quarter or an
            eighth of its size if that holds as much. Several times as fast for a photo of many
            megapixels; after a resize the pixels differ slightly.

    Raises:
        MissingFileError: the file does not exist or cannot be opened.
        ImageError: the file is empty, no image, truncated, corrupt or too large.
        InputError: `source` is none of these.

    Example:
        >>> image = load_image("photo.jpg")
        >>> inputs = processor(image, return_tensors="np")
    """
    if isinstance(source, PIL.Image.Image):
        given = getattr(source, "filename", "")
        return _plain(source, given if isinstance(given, str) and given else "the given image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"{len(source)} bytes", at_least)
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)  # a name may be of bytes
        try:
            stream = _File(io.FileIO(Path(name)), _BLOCK)  # closed below
        except (OSError, ValueError) as error:
            raise MissingFileError(
                f"{name if len(name) < 4096 else shown(name)}: cannot be opened ({reason(error)})."
            ) from error
        with stream:
            return _decode(stream, name, at_least)
    if not is_image_file(source):
        raise InputError(
            "`load_image` takes a path or a file open for reading in binary, the bytes of a file, "
            f"or a PIL image; given {type(source).__name__}."
        )
    given = getattr(source, "name", None)
    return _decode(source, given if isinstance(given, str) else "the given file", at_least)


def _decode(
    stream: BinaryIO, name: str, at_least: tuple[int, int] | None = None
) -> PIL.Image.Image:
    try:
        if isinstance(stream, io.BufferedReader):
            stream.peek()  # so that what is done under the lock need not wait for a disk
        _register_heif(_head(stream))
        # Pillow warns of large images at half the size it refuses; a filter is the only way to
        # keep that quiet, and the lock keeps threads from leaving each other's filters behind.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image: PIL.Image.Image = PIL.Image.open(stream)
        if at_least is not None:
            height, width = max(at_least), max(at_least)  # it may have to be turned
            image.draft(None, (width, height))  # does nothing to other kinds of file
    except MemoryError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, error)) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_why_unidentified(stream)}.") from error
    except Exception as error:  # Pillow's readers raise whatever broken data led them to
        raise ImageError(f"{name}: the image cannot be decoded ({reason(error)}).") from error
    return _plain(image, name)


def _plain(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """An opened image: decoded, upright, of one of `PLAIN_MODES`."""
    try:
        image.load()
        image = upright(image)
        if image.mode in PLAIN_MODES:
            return image
        plain = eight_bit(image)
        if plain.mode in PLAIN_MODES:
            return plain
        return plain.convert("RGB")
    except MemoryError:
        raise
    except ViTError as error:
        raise ImageError(f"{name}: {error}") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, error)) from error
    except Exception as error:
        raise ImageError(f"{name}: the image cannot be decoded ({reason(error)}).") from error


def _too_large(name: str, error: Exception) -> str:
    return (
        f"{name}: too large: {reason(error).rstrip('.')}. If you trust the file, raise "
        "`PIL.Image.MAX_IMAGE_PIXELS`; in a command, --max-pixels."
    )


def _head(stream: BinaryIO) -> bytes:
    """The first bytes of a file, which is left where it was."""
    try:
        position = stream.tell()
        head = stream.read(kinds.HEAD)
        stream.seek(position)
    except (OSError, ValueError, AttributeError):
        return b"?"
    return head


def _register_heif(head: bytes) -> None:
    """Let Pillow read HEIF photos, if this is one and pillow-heif is installed."""
    if kinds.is_heif(head) and kinds.can_read_heif():
        import pillow_heif

        pillow_heif.register_heif_opener()


def _why_unidentified(stream: BinaryIO) -> str:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.seek(0)
    head = _head(stream)
    if kinds.is_heif(head):
        return (
            "a HEIF photo, which Pillow reads with pillow-heif; run: pip install pillow-heif, or "
            "convert it to JPEG"
        )
    return "not an image, or of a kind that Pillow does not read" if head else "the file is empty"


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as it was seen, where its EXIF says that the camera was turned; else itself.

    Raises:
        ImageError: the file behind the image cannot be decoded.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata say nothing, and the pixels are there
        return image
    if orientation not in _TRANSPOSE:
        return image
    try:
        turned = image.transpose(_TRANSPOSE[orientation])
    except (ValueError, OSError, SyntaxError) as error:
        raise ImageError(f"the image cannot be decoded ({reason(error)}).") from error
    for key in _WITH_ORIENTATION:  # or the next call turns it again
        turned.info.pop(key, None)
    return turned
