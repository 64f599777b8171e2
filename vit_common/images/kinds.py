"""Which files are images, by name and by their first bytes. Nothing heavy is imported."""

from __future__ import annotations

import importlib.util
import re

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
_OTHERS = (
    ".png",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".jp2",
    ".j2k",
    ".tga",
)
EXTENSIONS = frozenset((*_JPEG, *_NETPBM, *_OTHERS))
"""Suffixes of image files that Pillow reads."""

HEIF = frozenset((".heic", ".heif", ".hif"))
"""Suffixes of photos that Pillow reads with pillow-heif."""

BESIDE = frozenset(
    (".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".log")
)
"""Suffixes of texts that lie beside images and are never taken for one."""

_RAW = frozenset(
    (".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2")
    + (".pef", ".srw", ".x3f", ".3fr", ".iiq", ".erf", ".kdc", ".mrw", ".raw", ".svs", ".ndpi")
)
# Camera files begin as TIFF does, and what Pillow would read in them is a thumbnail.

_DROPPINGS = frozenset((".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_APPLE_DOUBLE = b"\x00\x05\x16\x07"  # RFC 1740
_MAGIC = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",  # TIFF
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_NETPBM_HEAD = re.compile(rb"P[1-6][ \t\r\n]+(#|\d)")

HEAD = 32
"""Bytes at the beginning of a file that `is_image` and `is_heif` look at."""


def can_read_heif() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def is_heif(head: bytes) -> bool:
    """Whether a file that begins so is a HEIF photo."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is an image that can be read here."""
    if is_heif(head):
        return can_read_heif()
    return (
        head.startswith(_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
        or (head[:2] == b"BM" and head[6:10] == bytes(4) and head[14:18] in _BITMAP_HEADERS)
        or _NETPBM_HEAD.match(head) is not None
    )


# Sizes of the header that follows a bitmap's file header.
_BITMAP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))


def by_content(suffix: str) -> bool:
    """Whether the content of a file says if it is an image, because its suffix does not."""
    return suffix not in BESIDE and suffix not in _RAW


def is_apple_double(name: str, head: bytes) -> bool:
    """Whether a file is what macOS writes beside another one on foreign file systems."""
    return name.startswith("._") and head.startswith(_APPLE_DOUBLE)


def is_dropping(name: str) -> bool:
    """Whether a file, or a folder, is one that desktops leave in folders of images."""
    lower = name.lower()
    return lower in _DROPPINGS or lower == "__macosx" or lower.endswith(":zone.identifier")
