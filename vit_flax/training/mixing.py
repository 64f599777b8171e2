"""What happens to a batch inside the step: normalising, random erasing, mixup and cutmix.

The definitions are timm's (`timm.data.Mixup` by batch, `timm.data.random_erasing.RandomErasing`
with pixels of noise), in the order in which DeiT uses them. Random numbers come from the step's
key, so that a batch is mixed alike on any number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.errors import InputError
from vit_common.recipes import Recipe
from vit_flax.training.losses import IGNORED
from vit_flax.training.step import Prepare

__all__ = ["cutmix_box", "erasing_boxes", "mix", "mixing", "normalized", "soft_labels"]

_ATTEMPTS = 10
_AREA = (0.02, 1 / 3)
_ASPECT = (0.3, 1 / 0.3)


def mixing(
    recipe: Recipe,
    num_labels: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    rescale: float | None = 1 / 255,
) -> Prepare:
    """The `prepare` of `make_step` for a recipe: (batch, key) -> batch.

    Args:
        recipe: its `erasing`, `mixup`, `cutmix`, probabilities and `label_smoothing`.
        num_labels: classes; labels (B,) become (B, num_labels), mixed and smoothed, where images
            are mixed, and stay as they are otherwise. None is for batches without labels.
        mean, std: of each channel, by which 8-bit pixels are normalised; None leaves that out.
        rescale: factor of 8-bit pixels before that; None is 1.

    Returns:
        A function for batches whose "pixel_values" are uint8 (B, H, W, C), or floating (B, C, H,
        W), which are normalised already.

    Raises:
        InputError: a strength or probability is out of range.
    """
    for name in ("mixup_prob", "mixup_switch_prob", "erasing", "label_smoothing"):
        if not 0.0 <= getattr(recipe, name) <= 1.0:
            raise InputError(f"`{name}` must be from 0 to 1; given {getattr(recipe, name)!r}.")
    for name in ("mixup", "cutmix"):
        if not 0.0 <= getattr(recipe, name) < math.inf:
            raise InputError(f"`{name}` must be 0 or more; given {getattr(recipe, name)!r}.")

    def prepare(batch: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        erase_key, noise_key, mix_key = jax.random.split(key, 3)
        batch = {**batch, "pixel_values": normalized(batch["pixel_values"], mean, std, rescale)}
        if recipe.erasing > 0:
            batch["pixel_values"] = _erase(
                batch["pixel_values"], recipe.erasing, erase_key, noise_key
            )
        if (recipe.mixup > 0 or recipe.cutmix > 0) and "labels" in batch:
            batch = _mixed(recipe, num_labels, batch, mix_key)
        return batch

    return prepare


def normalized(
    pixel_values: jax.Array,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rescale: float | None,
) -> jax.Array:
    """8-bit pixels (B, H, W, C) as the processor makes them, (B, C, H, W) in float32; floating
    ones as they are."""
    values = jnp.asarray(pixel_values)
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values
    if values.dtype != jnp.uint8:
        raise InputError(f"`pixel_values` must be uint8 or floating; given {values.dtype}.")
    values = values.transpose(0, 3, 1, 2).astype(jnp.float32)
    C = values.shape[1]
    if rescale is not None:
        values = values * np.float32(rescale)
    if mean is not None and std is not None:
        centre, spread = (
            np.broadcast_to(np.asarray(each, np.float32), C)[None, :, None, None]
            for each in (mean, std)
        )
        values = (values - centre) / spread
    return values


# -- random erasing


def erasing_boxes(
    key: jax.Array, count: int, height: int, width: int, probability: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The box that is erased in each image: (top, bottom, left, right), each (count,) integers; an
    empty one where nothing is.

    As timm's: an area of 0.02 to 1/3 of the image, an aspect of 0.3 to 1/0.3 on a logarithmic
    scale, and the first of ten such boxes that is smaller than the image.
    """
    keys = jax.random.split(key, 5)
    shape = (count, _ATTEMPTS)
    area = height * width * jax.random.uniform(keys[0], shape, minval=_AREA[0], maxval=_AREA[1])
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]  # of none, 0, which then does not fit
    h, w, fits = (jnp.take_along_axis(each, first, axis=1)[:, 0] for each in (h, w, fits))
    chance, at_y, at_x = jax.random.uniform(keys[2], (3, count))
    erased = fits & (chance < probability)
    h, w = (jnp.where(erased, each, 0) for each in (h, w))
    # Uniform over the places where it fits, both ends included.
    top, left = (
        jnp.minimum((at * (room + 1).astype(at.dtype)).astype(jnp.int32), room)
        for at, room in ((at_y, height - h), (at_x, width - w))
    )
    return top, top + h, left, left + w


def _erase(
    images: jax.Array, probability: float, key: jax.Array, noise_key: jax.Array
) -> jax.Array:
    """Fill a box of some images (B, C, H, W) with normal noise, one draw for each pixel."""
    B, _, H, W = images.shape
    inside = _inside(*erasing_boxes(key, B, H, W, probability), H, W)  # (B, H, W)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(inside[:, None], noise, images)


def _inside(top: Any, bottom: Any, left: Any, right: Any, H: int, W: int) -> jax.Array:
    """(..., H, W), whether a pixel lies in the box."""
    rows, columns = jnp.arange(H), jnp.arange(W)
    top, bottom, left, right = (jnp.asarray(each)[..., None] for each in (top, bottom, left, right))
    inside_y = (rows >= top) & (rows < bottom)
    inside_x = (columns >= left) & (columns < right)
    return inside_y[..., :, None] & inside_x[..., None, :]


# -- mixup and cutmix


def cutmix_box(
    share: jax.Array, center: tuple[jax.Array, jax.Array], height: int, width: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The box of cutmix, (top, bottom, left, right), and the share that stays outside it.

    Args:
        share: of the image that should stay, lambda; the box is cut off at the border, and more
            stays there.
        center: (y, x) of the box.
        height, width: of the image.
    """
    ratio = jnp.sqrt(1.0 - share)
    cut_h, cut_w = (jnp.floor(side * ratio).astype(jnp.int32) for side in (height, width))
    y, x = center
    box = (
        jnp.clip(y - cut_h // 2, 0, height),
        jnp.clip(y + (cut_h + 1) // 2, 0, height),
        jnp.clip(x - cut_w // 2, 0, width),
        jnp.clip(x + (cut_w + 1) // 2, 0, width),
    )
    area = (box[1] - box[0]) * (box[3] - box[2])
    return box, 1.0 - area.astype(share.dtype) / (height * width)


def soft_labels(labels: jax.Array, num_labels: int, smoothing: float, dtype: Any) -> jax.Array:
    """(B, K) probabilities of class indices (B,), smoothed; others as they are."""
    if labels.ndim > 1 or jnp.issubdtype(labels.dtype, jnp.floating):
        return labels.astype(dtype)
    one = jax.nn.one_hot(labels, num_labels, dtype=dtype)
    return (1.0 - smoothing) * one + smoothing / num_labels


def mix(
    images: jax.Array, targets: jax.Array, share: jax.Array, box: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Images (B, C, H, W) and targets (B, ...) mixed with those of the batch in reverse order.

    Args:
        images: a batch.
        targets: soft labels.
        share: that stays of each image, scalar or (B,); for cutmix, of its area.
        box: for cutmix, what is pasted: (top, bottom, left, right), scalars or (B,).
    """
    share = jnp.asarray(share, images.dtype)
    wide = share.reshape(share.shape + (1,) * (images.ndim - 1 if share.ndim else 0))
    if box is None:
        mixed = images * wide + images[::-1] * (1.0 - wide)
    else:
        inside = _inside(*box, *images.shape[-2:])
        inside = inside[:, None] if inside.ndim == 3 else inside
        mixed = jnp.where(inside, images[::-1], images)
    share = share.astype(targets.dtype)
    share = share.reshape(share.shape + (1,) * (targets.ndim - 1 if share.ndim else 0))
    return mixed, targets * share + targets[::-1] * (1.0 - share)


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    if alpha == 1.0:
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)


def _mixed(
    recipe: Recipe, num_labels: int | None, batch: dict[str, Any], key: jax.Array
) -> dict[str, Any]:
    """The batch after mixup or cutmix. An image whose partner does not count stays as it is."""
    images, labels = batch["pixel_values"], jnp.asarray(batch["labels"])
    H, W = images.shape[-2:]
    keys = jax.random.split(key, 5)
    counts = jnp.ones(len(labels), bool)
    if labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.integer):
        if num_labels is None:
            raise InputError("`num_labels`: mixing class indices needs the number of classes.")
        counts &= labels != IGNORED
        rows = counts.astype(jnp.float32)
        # A label that no class has must not become one without: its row becomes NaN.
        wrong = counts & ((labels < 0) | (labels >= num_labels))
        batch["weights"] = rows * jnp.asarray(batch.get("weights", rows)).astype(jnp.float32)
        batch["weights"] = jnp.where(wrong, jnp.nan, batch["weights"])
    if "weights" in batch:
        counts &= jnp.asarray(batch["weights"]) > 0
    smoothing = recipe.label_smoothing
    targets = soft_labels(labels, num_labels or 0, smoothing, images.dtype)

    share = _beta(keys[0], recipe.mixup) if recipe.mixup > 0 else jnp.ones(())
    mixes = jax.random.uniform(keys[1]) < recipe.mixup_prob
    if recipe.cutmix > 0:
        center = (jax.random.randint(keys[2], (), 0, H), jax.random.randint(keys[3], (), 0, W))
        drawn = _beta(keys[4], recipe.cutmix)
        box, kept = cutmix_box(drawn, center, H, W)
        cuts = jnp.ones((), bool)
        if recipe.mixup > 0:
            switch_key = jax.random.fold_in(key, 5)
            cuts = jax.random.uniform(switch_key) < recipe.mixup_switch_prob
    each = mixes & counts[::-1]  # (B,)

    def at(value: jax.Array) -> jax.Array:
        return jnp.where(each, value, jnp.ones_like(value))

    blended, soft = mix(images, targets, at(share))
    if recipe.cutmix > 0:
        empty = tuple(jnp.where(each, side, 0) for side in box)
        pasted, cut_soft = mix(images, targets, at(kept), empty)
        blended = jnp.where(cuts, pasted, blended)
        soft = jnp.where(cuts, cut_soft, soft)
    return {**batch, "pixel_values": blended, "labels": soft}
