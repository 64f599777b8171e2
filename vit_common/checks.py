"""Checks of the arguments of calls, shared by both twins; each raises before any arithmetic."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import InputError, shown


def as_integer(value: Any) -> int | None:
    """A value of any type of integers, numpy's too, as an int; None for others, a bool too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_positive(name: str, value: Any) -> int:
    """The value as an int; raises InputError unless it is a positive integer."""
    number = as_integer(value)
    if number is None or number < 1:
        raise InputError(f"`{name}` must be a positive integer; given {shown(value)}.")
    return number


def auto_class_name(auto_class: str | type) -> str:
    """The name in an argument of `register_for_auto_class`: an `Auto` class or its name.

    Raises:
        InputError: it is no such name.
    """
    name = getattr(auto_class, "__name__", auto_class)
    if not isinstance(name, str) or not re.fullmatch(r"(Flax|TF)?Auto[A-Z]\w*", name):
        raise InputError(
            f"`auto_class` must be an Auto class or the name of one; given {shown(auto_class)}."
        )
    return name


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value, value) of each setting that differs; one that is absent counts as None."""
    names = dict.fromkeys((*one, *other))
    return [(n, one.get(n), other.get(n)) for n in names if one.get(n) != other.get(n)]


CROP = "crop"
"""A value of `interpolate_pos_encoding`: other sizes are taken, and cut to whole patches."""

Interpolate = bool | Literal["crop"] | None


def check_image(
    channels: int, height: int, width: int, config: ViTConfig, *, interpolate: Interpolate
) -> tuple[int, int]:
    """The grid (rows, columns) of patches of an image.

    Args:
        channels, height, width: the image's.
        config: the model's.
        interpolate: whether other sizes than the config's are taken; with "crop", also those that
            hold no whole number of patches, of which the last rows and columns are left out.

    Raises:
        InputError: the channels or the size are not the model's; the size holds no whole number of
            patches; `interpolate` is none of its values.
    """
    if interpolate not in (None, False, True, CROP):
        raise InputError(
            f"`interpolate_pos_encoding` must be True, False, None or {CROP!r}; given "
            f"{interpolate!r}."
        )
    if channels != config.num_channels:
        hint = ""
        if width == config.num_channels:
            hint = " Channels seem to be last; models take (batch, channels, height, width)."
        elif height == config.num_channels:
            hint = " Channels seem to be first; Flax modules take (batch, height, width, channels)."
        raise InputError(
            f"`pixel_values` must have {config.num_channels} channels; given {channels}.{hint}"
        )
    wanted = config.image_height_width
    if (height, width) == wanted:
        return config.grid_size
    if not interpolate and not config.any_image_size:
        raise InputError(
            f"`pixel_values` must be {wanted[0]} x {wanted[1]} pixels (height x width); given "
            f"{height} x {width}. Resize the image, or pass `interpolate_pos_encoding=True` to "
            "resample the position embeddings."
        )
    patch = config.patch_height_width
    rows, columns = height // patch[0], width // patch[1]
    if interpolate == CROP and rows and columns:
        return rows, columns
    if height % patch[0] or width % patch[1] or not height or not width:
        raise InputError(
            f"`pixel_values` must hold whole patches of {patch[0]} x {patch[1]} pixels (height x "
            f"width); given {height} x {width}. Resize or crop the image, for example to "
            f"{max(rows, 1) * patch[0]} x {max(columns, 1) * patch[1]}; or pass "
            f"`interpolate_pos_encoding={CROP!r}` to leave out the last rows and columns, as "
            "Transformers does without saying so."
        )
    return rows, columns


def check_tokens(shape: tuple[int, ...], config: Any) -> None:
    """Raise InputError unless texts are (batch, tokens), of as many tokens as the model has places
    for."""
    if len(shape) != 2 or not shape[1]:
        raise InputError(f"`input_ids` must be (batch, tokens); given the shape {tuple(shape)}.")
    most = config.max_position_embeddings
    if shape[1] > most:
        raise InputError(
            f"`input_ids` must hold at most {most} tokens a text; given {shape[1]}. Cut the texts "
            "off where they are made into tokens."
        )


def check_beside_tokens(shape: tuple[int, ...], **beside: tuple[int, ...] | None) -> None:
    """Raise InputError unless what goes with token ids (B, S), by name, is (B, S) or (1, S)."""
    for name, given in beside.items():
        if given is not None and tuple(given) not in (tuple(shape), (1, *shape[1:])):
            raise InputError(
                f"`{name}` must have the shape of `input_ids`, {tuple(shape)}; given "
                f"{tuple(given)}."
            )


def check_token_ids(name: str, ids: np.ndarray | None, count: int) -> None:
    """Raise InputError unless known ids, integers, are from 0 to below `count`."""
    if ids is None or not ids.size:
        return
    if ids.dtype.kind not in "iu":
        raise InputError(f"`{name}` must hold integers; given {ids.dtype}.")
    if ids.min() < 0 or ids.max() >= count:
        raise InputError(
            f"`{name}` must hold ids from 0 to {count - 1}; given {ids.min()} to {ids.max()}."
        )


def check_keywords(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError, naming them all, if `what` was given unknown keywords."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(
            f"{what} has no keyword {', '.join(map(repr, unknown))}; wanted one of "
            f"{', '.join(known)}."
        )


def check_rank(pixel_values: Any, layout: str) -> None:
    """Raise InputError unless `pixel_values` is a batch of images."""
    shape = tuple(getattr(pixel_values, "shape", ()))
    if len(shape) != 4:
        raise InputError(
            f"`pixel_values` must have 4 dimensions, {layout}; given shape {shape}."
            + (" Add a batch dimension: `pixel_values[None]`." if len(shape) == 3 else "")
        )


def check_mask(shape: tuple[int, ...], batch: int, patches: int) -> None:
    """Raise InputError unless `bool_masked_pos` has one value per patch."""
    if tuple(shape) != (batch, patches):
        raise InputError(
            f"`bool_masked_pos` must have shape (batch, patches) = ({batch}, {patches}); given "
            f"{tuple(shape)}."
        )


def check_head_mask(shape: tuple[int, ...], config: ViTConfig) -> None:
    """Raise InputError unless `head_mask` is (A,), (L, A) or, spread, (L, 1, A, 1, 1)."""
    L, A = config.num_hidden_layers, config.num_attention_heads
    shape = tuple(shape)
    if shape in ((A,), (L, A)) or shape == (L, 1, A, 1, 1):
        return
    raise InputError(
        f"`head_mask` must have shape (heads,) = ({A},) or (layers, heads) = ({L}, {A}); given "
        f"{shape}."
    )


def check_labels(labels: Any, problem_type: str, batch: int, num_labels: int) -> None:
    """Raise InputError unless `labels` fits the loss. The values of class indices are checked too.

    Args:
        labels: numpy array, or anything with `.shape` whose values cannot be read.
        problem_type: result of `resolve_problem_type`.
        batch: number of images.
        num_labels: number K of classes.
    """
    shape = tuple(labels.shape)
    if problem_type == "single_label_classification":
        if not _is_integer(labels):
            raise InputError(
                f"`labels` must be class indices, of an integer dtype; given {labels.dtype}. For "
                "several labels per image, set `problem_type` to 'multi_label_classification'."
            )
        if math.prod(shape) != batch:
            raise InputError(
                f"`labels` must hold one class index per image, shape ({batch},); given {shape}."
            )
        if isinstance(labels, np.ndarray):
            bad = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
            if bad.size:
                raise InputError(
                    f"`labels` must be from 0 to {num_labels - 1} (or -100 to be ignored); given "
                    f"{bad.reshape(-1)[0]}."
                )
    elif num_labels == 1 and problem_type == "regression":
        if math.prod(shape) != batch:
            raise InputError(
                f"`labels` must hold one number per image, shape ({batch},); given {shape}."
            )
    elif shape != (batch, num_labels):
        raise InputError(
            f"`labels` must have shape (batch, classes) = ({batch}, {num_labels}) for "
            f"{problem_type}; given {shape}."
        )


def check_token_labels(labels: Any, mask: Any, shape: tuple[int, ...]) -> None:
    """Raise InputError unless there is a label for each patch, and a mask that says which count.

    Args:
        labels: visual tokens.
        mask: `bool_masked_pos`.
        shape: of the logits (B, N, vocab_size).
    """
    if mask is None:
        raise InputError(
            "`labels` need `bool_masked_pos`: the loss is computed on the masked patches."
        )
    masked = int(np.asarray(mask != 0).sum()) if len(labels.shape) == 1 else None
    if not _is_integer(labels) or tuple(labels.shape) not in (tuple(shape[:2]), (masked,)):
        raise InputError(
            f"`labels` must be integers of shape (batch, patches) = {tuple(shape[:2])}, one visual "
            "token per patch, or hold those of the masked patches alone; given "
            f"{labels.dtype} of shape {tuple(labels.shape)}."
        )


def _is_integer(labels: Any) -> bool:
    """Whether the dtype is an integer one; of numpy, JAX or torch."""
    name = str(labels.dtype).removeprefix("torch.")
    return name.startswith(("int", "uint"))


def resolve_problem_type(config: ViTConfig, integer_labels: bool) -> str:
    """The loss that labels mean; the configuration stays as it is."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "single_label_classification" if integer_labels else "multi_label_classification"


def check_stride(config: ViTConfig, height: int, width: int) -> None:
    """Raise InputError unless the decoder restores as many pixels as the image has."""
    patch = config.patch_height_width
    if height % patch[0] or width % patch[1]:
        raise InputError(
            f"`bool_masked_pos` needs an image of whole patches of {patch[0]} x {patch[1]} pixels "
            f"(height x width), so that each is reconstructed; given {height} x {width}."
        )
    if config.patch_height_width != (config.encoder_stride, config.encoder_stride):
        raise InputError(
            "`bool_masked_pos` needs `patch_size` and `encoder_stride` to be equal, so that the "
            f"reconstruction has the image's size; given {config.patch_size!r} and "
            f"{config.encoder_stride}."
        )


def patch_grid(shape: tuple[int, ...], spatial_shapes: Any, config: ViTConfig) -> tuple[int, int]:
    """Rows and columns of the patches in a batch of flattened ones.

    Args:
        shape: of the patches, (B, N, P P C).
        spatial_shapes: (B, 2), rows and columns of each image.
        config: the sizes.

    Raises:
        InputError: they are not those of images of one size.
    """
    height, width = config.patch_height_width
    size = height * width * config.num_channels
    if shape[2] != size:
        raise InputError(
            f"flattened patches must be of {size} numbers, {height} x {width} pixels of "
            f"{config.num_channels} channels; given {shape[2]}."
        )
    if not shape[0]:
        raise InputError("flattened patches must be of at least one image; given none.")
    given = np.asarray(() if spatial_shapes is None else spatial_shapes)
    if given.shape != (shape[0], 2) or given.dtype.kind not in "iu":
        raise InputError(
            "`spatial_shapes` must be given with flattened patches: rows and columns of each image,"
            f" integers ({shape[0]}, 2); given "
            + ("None." if spatial_shapes is None else f"{given.dtype} of shape {given.shape}.")
        )
    grids = {(rows, columns) for rows, columns in given.tolist()}
    if len(grids) > 1:
        raise InputError(
            f"`spatial_shapes` must be the same for all images of a batch; given {sorted(grids)}. "
            "Run images of other shapes in a batch of their own."
        )
    rows, columns = grids.pop()
    if min(rows, columns) < 1 or rows * columns > shape[1]:
        raise InputError(
            f"`spatial_shapes` must be of at most {shape[1]} patches and at least one; "
            f"given {rows} x {columns}."
        )
    return rows, columns
