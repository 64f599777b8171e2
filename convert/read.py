"""Where in a file the network lies, in which format, and its tensors under canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_common.files.checkpoint import Tensor
from vit_convert.detect import BESIDE, Root, detect_format, find_root
from vit_convert.formats.format import Format
from vit_convert.formats.google import unstacked
from vit_convert.leftovers import kind_of
from vit_convert.rules import Mapped, to_canonical


class Read(NamedTuple):
    """What `read_tensors` finds: where the network lies in a file, its tensors under the names of
    its format, the format, the canonical tensors, what is left aside and why, and names that
    nothing here knows."""

    root: Root
    tensors: dict[str, Tensor]
    table: Format
    mapped: Mapped
    ignored: dict[str, str]
    unexplained: list[str]


def read_tensors(
    checkpoint: Mapping[str, Any],
    *,
    format: str | None = None,
    hints: Mapping[str, str] | None = None,
) -> Read:
    """Find the network in a file.

    Raises:
        CheckpointError: no network is in it, or it fits no format, or several.
        InputError: there is no format of that name.
    """
    root = find_root(checkpoint)
    parts = unstacked({bare: checkpoint[full] for bare, full in root.keys.items()})
    tensors = {name: tensor for name, (_, tensor) in parts.items()}
    hints = {**dict(hints or {}), "root": root.path}
    table = detect_format(tensors, name=format, hints=hints, shapes=tensors)
    mapped = to_canonical(tensors, table)
    # Transformers saves a parameter of no entries where there are no registers.
    mapped.tensors = {
        name: tensor for name, tensor in mapped.tensors.items() if 0 not in tensor.shape
    }
    bare = table.strip(tensors)
    original = {full: key for key, full in bare.items()}
    # What was trained and lies beside the network may be its head, whatever it is called.
    unexplained = [
        name
        for name, why in root.ignored.items()
        if why.startswith(BESIDE) and kind_of(name, checkpoint[name], outside=True) == "head"
    ]
    ignored = {name: why for name, why in root.ignored.items() if name not in unexplained}
    for name in mapped.unused:
        why = table.why_ignored(original.get(name, name))
        full = root.keys[parts[name][0]]
        if why:
            ignored[full] = why
        elif full not in unexplained:
            unexplained.append(full)
    return Read(root, tensors, table, mapped, ignored, unexplained)
