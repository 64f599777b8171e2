"""The same preparation of images for another size."""

from __future__ import annotations

from typing import Any

from vit_common.images.processor import BaseImageProcessor


def processor_at_size(
    processor: BaseImageProcessor, old: tuple[int, int], new: tuple[int, int]
) -> BaseImageProcessor:
    """A processor that makes images of another size as this one makes those of its own.

    What is resized grows or shrinks with what comes out, so that a crop keeps the same part of an
    image; where only the shortest edge is resized to, it grows enough for both sides of the crop.

    Args:
        processor: is left as it is.
        old: (height, width) of what comes out now, where the processor itself does not say it.
        new: (height, width) of what is to come out.

    Example:
        >>> processor = ViTImageProcessor(size={"height": 224, "width": 224})
        >>> processor_at_size(processor, (224, 224), (384, 384)).size
        {'height': 384, 'width': 384}
    """
    table: dict[str, Any] = processor.to_dict()
    size = dict(table.get("size") or {})
    crop = dict(table.get("crop_size") or {}) if table.get("do_center_crop") else {}
    # What comes out now: the crop, or else what images are resized to. It need not be the
    # network's size: DINOv2's is 518 and its images are 224.
    now = crop or size
    h, w = now.get("height"), now.get("width")
    if not (h and w):
        h, w = old
    rows, columns = new[0] / h, new[1] / w
    factors = {"height": rows, "width": columns, "shortest_edge": max(rows, columns)}
    for key, factor in factors.items():
        if size.get(key):
            size[key] = round(size[key] * factor)
    table["size"] = size
    if crop:
        table["crop_size"] = {"height": new[0], "width": new[1]}
    return type(processor).from_dict(table)
