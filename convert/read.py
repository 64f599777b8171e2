"""Where in a file the network lies, in which format, and its tensors under canonical names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.files.checkpoint import Tensor
from vit_common.parameters import TOP_PARAMETERS
from vit_common.positions import relative_distances, resize_positions, resize_relative_positions
from vit_convert.detect import Root, detect_format, find_root
from vit_convert.formats import PREPARED
from vit_convert.formats.format import Format
from vit_convert.infer import Note
from vit_convert.leftovers import kind_of
from vit_convert.rules import Mapped, TensorLike, as_mapped, to_canonical

POSITIONS = "embeddings.position_embeddings"
TABLE = "relative_position_bias_table"
"""What the names of relative position bias tables end with."""
_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_MATRIX = re.compile(r"(?P<stem>.*?)(?P<leaf>[./]?(?:weight|kernel))")
# Part of the name of a module that is a classifier: fc, head, classifier.1, linear, lin_cls, ...
_CLASSIFIER = re.compile(r"fc|head|class|linear|\blin\b|cls|clf|logit|output|probe|predict")


# A matrix in a block belongs to the block, whatever it is called.
_IN_BLOCK = re.compile(r"(block|layer)s?[._/]?_?\d", re.IGNORECASE)


@dataclass
class Read:
    """What `read_tensors` finds.

    Attributes:
        root: where the network lies in the file.
        tensors: its tensors under the names of its format.
        table: the format.
        mapped: the tensors under canonical names.
        ignored: name in the file -> why it is left aside.
        unexplained: names in the file that nothing here knows.
        parts: some of those -> what in the network they belong to, which no model here has.
        notes: what was done to tensors, and what says so.
        classifier: the tensors that were taken for it, and why, where their names do not say it.
        labels: its number of classes then; else None.
    """

    root: Root
    tensors: dict[str, Tensor]
    table: Format
    mapped: Mapped
    ignored: dict[str, str]
    unexplained: list[str]
    parts: dict[str, str]
    notes: list[Note]
    classifier: str = ""
    labels: int | None = None

    def complete(self, config: ViTConfig) -> None:
        """Add what a configuration says of the tensors and no file holds: fixed positions."""
        made = self.table.positions
        if made is None or POSITIONS in self.mapped.tensors:
            return
        grid, width = config.grid_size, config.hidden_size
        if config.num_prefix_positions:
            return
        shape, dtype = (1, grid[0] * grid[1], width), self.mapped.tensors[_PROJECTION].dtype
        tensor = Tensor(POSITIONS, shape, dtype, lambda: fixed_positions(made, grid, tensor))
        self.mapped.tensors[POSITIONS] = as_mapped(tensor)
        self.notes.append(Note("positions", "sines and cosines", "none in the file"))


def fixed_positions(
    positions: Callable[[tuple[int, int], int], np.ndarray],
    grid: tuple[int, int],
    like: TensorLike,
) -> np.ndarray:
    """The positions (1, N, D) that a format's networks have for a grid of patches, of the width and
    dtype of a tensor."""
    return positions(grid, like.shape[2])[None].astype(like.dtype)


def check_divides(config: ViTConfig) -> None:
    """Raise InputError if images of a configuration's size hold no whole number of patches."""
    (height, width), (p, q) = config.image_height_width, config.patch_height_width
    if height % p or width % q:
        raise InputError(
            f"`image_size` must be a multiple of the patch, {p} x {q} (height x width); given "
            f"{height} x {width}."
        )


def fits_grid(tensors: Mapping[str, TensorLike], config: ViTConfig) -> bool:
    """Whether positions, absolute and relative, are those of the configuration's grid."""
    grid = config.grid_size
    rows = config.num_prefix_positions + grid[0] * grid[1]
    return all(
        tensor.shape[1] == rows
        if name == POSITIONS
        else tensor.shape[0] == relative_distances(grid)
        for name, tensor in tensors.items()
        if name == POSITIONS or name.endswith(TABLE)
    )


def resample(
    tensors: Mapping[str, TensorLike], table: Format, old: ViTConfig, new: ViTConfig
) -> tuple[dict[str, Tensor], str]:
    """Positions for images of another size, by the rule of the checkpoint they come from.

    Args:
        tensors: canonical name -> tensor, of which positions are looked at.
        table: the format they were read in.
        old: the configuration that they fit.
        new: the same with another `image_size`.

    Returns:
        The tensors that change, not read yet; and how they are resampled, for a report.

    Raises:
        InputError: the patch does not divide the new size.
    """
    check_divides(new)
    source, target, count = old.grid_size, new.grid_size, old.num_prefix_positions
    out: dict[str, Tensor] = {}
    how: dict[str, None] = {}
    for name, tensor in tensors.items():
        if name == POSITIONS:
            shape: tuple[int, ...] = (1, count + target[0] * target[1], tensor.shape[2])
            if (fixed := table.positions) is None:
                rule = old.position_resize
                load = partial(_resized, tensor, resize_positions, source, target, rule, count)
                how[f"positions by {rule}"] = None
            else:  # the authors' own code computes them for any size
                load = partial(fixed_positions, fixed, target, tensor)
                how["positions computed anew"] = None
        elif name.endswith(TABLE):
            relative = table.relative_resize
            load = partial(_resized, tensor, resize_relative_positions, source, target, relative)
            shape = (relative_distances(target), tensor.shape[1])
            how[f"relative positions by {relative}"] = None
        else:
            continue
        out[name] = Tensor(name, shape, tensor.dtype, load)
    return out, "; ".join(how)


def _resized(tensor: TensorLike, resize: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
    return resize(tensor.read(), *args)


def read_tensors(
    checkpoint: Mapping[str, Any],
    *,
    format: str | None = None,
    hints: Mapping[str, str] | None = None,
) -> Read:
    """Find the network in a file.

    A classifier is found under whatever name it has, where it is the one matrix of the network's
    width that nothing else explains.

    Raises:
        CheckpointError: no network is in it, or it fits no format, or several.
        InputError: there is no format of that name.
    """
    root = find_root(checkpoint)
    parts = {bare: (bare, checkpoint[full]) for bare, full in root.keys.items()}
    notes: list[Note] = []
    for prepare in PREPARED:
        parts, done = prepare(parts)
        if done is not None:
            notes.append(Note(*done))
    tensors = {name: tensor for name, (_, tensor) in parts.items()}
    hints = {**dict(hints or {}), "root": root.path}
    also = [name for name in root.keys if name not in tensors]
    table = detect_format(tensors, name=format, hints=hints, shapes=tensors, also=also)
    mapped = to_canonical(tensors, table)
    # Transformers saves a parameter of no entries where there are no registers.
    mapped.tensors = {
        name: tensor for name, tensor in mapped.tensors.items() if 0 not in tensor.shape
    }
    bare = table.strip(tensors)
    original = {full: key for key, full in bare.items()}
    # What was trained and lies beside the network may be its head, whatever it is called.
    kinds = {name: kind_of(name, checkpoint[name], outside=True) for name in root.beside}
    where = f"outside {root.path!r}, where the network is"
    ignored = {**root.ignored, **{n: where for n, kind in kinds.items() if kind != "head"}}
    heads = [name for name, kind in kinds.items() if kind == "head"]
    read = Read(root, tensors, table, mapped, ignored, heads, {}, notes)
    for name in mapped.unused:
        key = original.get(name, name)
        why = table.why_ignored(key)
        full = root.keys[parts[name][0]]
        if why:
            read.ignored[full] = why
        elif full not in read.unexplained:
            read.unexplained.append(full)
            if part := table.part_of(key):
                read.parts[full] = part
    _find_classifier(read, checkpoint)
    return read


def _find_classifier(read: Read, checkpoint: Mapping[str, Tensor]) -> None:
    """Take the one matrix, and its bias, that are left over as the classifier."""
    found = read.mapped.tensors
    if any(name.startswith(TOP_PARAMETERS) for name in found) or not read.unexplained:
        return
    left = {name: checkpoint[name] for name in read.unexplained}
    matrices = [name for name, tensor in left.items() if len(tensor.shape) == 2]
    match = _MATRIX.fullmatch(matrices[0]) if len(matrices) == 1 else None
    if match is None:
        return
    stem, leaf, matrix = match["stem"], match["leaf"], left[matrices[0]]
    bias = left.get(f"{stem}{leaf[:-6]}bias")
    rest = len(left) - 1 - (bias is not None)
    transposed = leaf.endswith("kernel")
    labels, inputs = matrix.shape[::-1] if transposed else matrix.shape
    family = read.table.families[0]
    width = found[_PROJECTION].shape[0] * (2 if family.startswith("dinov") else 1)
    own = stem.removeprefix(read.root.path)
    if rest or inputs != width or not _CLASSIFIER.search(own.lower()) or _IN_BLOCK.search(own):
        return
    if bias is None:
        bias = Tensor("", (labels,), matrix.dtype, lambda: np.zeros(labels, matrix.dtype))
    if bias.shape != (labels,) or bias.dtype != matrix.dtype:
        return

    def load() -> np.ndarray:
        return matrix.read().T if transposed else matrix.read()

    weight = Tensor("classifier.weight", (labels, inputs), matrix.dtype, load)
    found["classifier.weight"], found["classifier.bias"] = as_mapped(weight), as_mapped(bias)
    read.unexplained.clear()
    read.labels = labels
    said = f"{matrices[0]} and {f'{stem}{leaf[:-6]}bias' if len(left) > 1 else 'no bias'}"
    why = "the one matrix of the network's width that nothing else explains"
    if "pooler.dense.weight" in found:
        why += (
            ", on the class token; if it stands on the pooler, say `use_representation_layer=True`"
        )
    read.classifier = f"{said} ({why})"
    read.notes.append(Note("classifier", said, why))
