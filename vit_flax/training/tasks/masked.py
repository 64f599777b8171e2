"""Masked image modelling: which patches are hidden, and the loss of what is drawn in their place.

Source: SimMIM (Xie et al. 2022, arXiv:2111.09886), as `run_mim.py` (`MaskGenerator`) and
`ViTForMaskedImageModeling` of Transformers 4.57.6 have it; for BEiT, `BeitForMaskedImageModeling`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.augment import draws
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.recipes import Recipe
from vit_flax.training.step import Batch, Loss, Prepare, Total

__all__ = ["MaskGenerator", "masking", "reconstruction", "visual_tokens"]

MASK = "bool_masked_pos"
"""Entry of a batch: (B, N), whether a patch is hidden."""
_EPSILON = "mask_epsilon"
# Entry of a batch: (B,), each row's share of what is added to the number of pixels, so that parts
# of a batch add up to the whole.
_DRAW = 1 << 20  # of an image's draws in an epoch, far from those of its repetitions


class MaskGenerator:
    """Draws which patches of an image are hidden: squares of several patches, a fixed number of
    them, anywhere.

    Args:
        config: of the network; its image and patch size count.
        mask_patch_size: side of a square in pixels; a multiple of the patch that divides the image.
        mask_ratio: share of the squares that are hidden, rounded up.

    Attributes:
        grid: (rows, columns) of squares.
        count: squares that are hidden in each image.

    Raises:
        InputError: the sizes do not fit, or the ratio is not between 0 and 1.

    Example:
        >>> MaskGenerator(ViTConfig(), 32, 0.6)(np.random.default_rng(0)).shape
        (196,)
    """

    def __init__(self, config: ViTConfig, mask_patch_size: int = 32, mask_ratio: float = 0.6):
        size, patch = config.image_height_width, config.patch_height_width
        whole = isinstance(mask_patch_size, int) and not isinstance(mask_patch_size, bool)
        if not whole or mask_patch_size < 1 or any(mask_patch_size % p for p in patch):
            raise InputError(
                f"`mask_patch_size` must be a multiple of the patch, {patch[0]} x {patch[1]} "
                f"pixels; given {mask_patch_size!r}."
            )
        if any(side % mask_patch_size for side in size):
            raise InputError(
                f"`mask_patch_size` must divide the image, {size[0]} x {size[1]} pixels; given "
                f"{mask_patch_size}. Choose another, or another `image_size`."
            )
        if not 0.0 < mask_ratio <= 1.0:
            raise InputError(f"`mask_ratio` must be over 0, and 1 at most; given {mask_ratio!r}.")
        self.grid = (size[0] // mask_patch_size, size[1] // mask_patch_size)
        self.scale = (mask_patch_size // patch[0], mask_patch_size // patch[1])
        self.squares = self.grid[0] * self.grid[1]
        self.count = math.ceil(self.squares * mask_ratio)

    def __call__(self, source: np.random.Generator) -> np.ndarray:
        """(N,) of bool, from a source of random numbers on the host."""
        hidden = np.zeros(self.squares, bool)
        hidden[source.permutation(self.squares)[: self.count]] = True
        return np.asarray(self._spread(hidden[None], np))[0]

    def of(self, seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
        """(B, N) of bool for images by their indices in the data set, the same whatever else is in
        the batch.

        Args:
            seed, epoch: of the run.
            index: (B,); below 0 for a row that is no image, which gets some mask too.
        """
        rows = [self(draws(seed, epoch, max(int(i), 0), _DRAW)) for i in np.asarray(index)]
        return np.stack(rows)

    def on_device(self, key: jax.Array, batch: int) -> jax.Array:
        """(B, N) of bool, drawn from a key inside a program."""
        rank = jnp.argsort(jax.random.uniform(key, (batch, self.squares)), axis=1)
        hidden = jnp.zeros((batch, self.squares), bool)
        hidden = hidden.at[jnp.arange(batch)[:, None], rank[:, : self.count]].set(True)
        return self._spread(hidden, jnp)

    def _spread(self, hidden: Any, numpy: Any) -> Any:
        """Squares (B, squares) as the patches (B, N) in them."""
        hidden = hidden.reshape(-1, *self.grid)
        for axis, scale in zip((1, 2), self.scale, strict=True):
            hidden = numpy.repeat(hidden, scale, axis=axis)
        return hidden.reshape(len(hidden), -1)


def masking(recipe: Recipe, config: ViTConfig, prepare: Prepare) -> Prepare:
    """A `prepare` that hides patches after another has prepared the pixels.

    Args:
        recipe: its `mask_patch_size` and `mask_ratio`.
        config: of the network.
        prepare: (batch, key) -> batch with "pixel_values" (B, C, H, W).

    Returns:
        The same, and "bool_masked_pos" (B, N) unless the batch has it; drawn for the whole batch
        from the step's key, so on any number of devices alike.

    Raises:
        InputError: as `MaskGenerator`.
    """
    generator = MaskGenerator(config, recipe.mask_patch_size, recipe.mask_ratio)

    def masked(batch: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        batch = dict(prepare(batch, key))
        B = batch["pixel_values"].shape[0]
        if MASK not in batch:
            batch[MASK] = generator.on_device(jax.random.fold_in(key, _DRAW), B)
        batch[_EPSILON] = jnp.full(B, 1e-5 / B, jnp.result_type(float))
        return batch

    return masked


def reconstruction(config: ViTConfig) -> Loss:
    """The mean absolute error over the pixels of hidden patches, as `ViTForMaskedImageModeling` of
    Transformers 4.57.6: sum / (pixels + 1e-5) / channels. Rows of weight 0 do not count.

    Args:
        config: of the network; its patch size counts.
    """
    p, q = config.patch_height_width

    def loss(outputs: Any, batch: Batch) -> Total:
        drawn, wanted = outputs.reconstruction, batch["pixel_values"]  # (B, C, H, W)
        dtype = jnp.promote_types(drawn.dtype, jnp.float32)
        B, C, H, W = wanted.shape
        mask = jnp.asarray(batch[MASK]).reshape(B, H // p, W // q)
        mask = mask.repeat(p, axis=1).repeat(q, axis=2)[:, None].astype(dtype)  # (B, 1, H, W)
        if "weights" in batch:
            mask = mask * (jnp.asarray(batch["weights"]) > 0).astype(dtype)[:, None, None, None]
        error = jnp.abs(wanted.astype(dtype) - drawn.astype(dtype))
        total = jnp.where(mask > 0, error, 0.0).sum()
        pixels = mask.sum()
        epsilon = batch[_EPSILON].sum().astype(dtype) if _EPSILON in batch else 1e-5
        count = jnp.where(pixels > 0, (pixels + epsilon) * C, 0.0)
        return Total(total, count)

    return loss


def visual_tokens() -> Loss:
    """The cross entropy of the visual tokens of hidden patches, as `BeitForMaskedImageModeling` of
    Transformers 4.57.6. The batch's "labels" are (B, N) tokens; those of patches that are not
    hidden do not count. Its metric is "accuracy"."""

    def loss(outputs: Any, batch: Batch) -> Total:
        logits = outputs.logits  # (B, N, V)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        labels = jnp.asarray(batch["labels"])
        if labels.shape != logits.shape[:2]:
            raise InputError(
                f"labels must be a visual token for each patch, {logits.shape[:2]}; given shape "
                f"{labels.shape}."
            )
        counts = jnp.asarray(batch[MASK]).reshape(labels.shape).astype(bool)
        if "weights" in batch:
            counts &= (jnp.asarray(batch["weights"]) > 0)[:, None]
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.where(counts, labels, 0)[..., None], axis=-1
        )[..., 0]
        right = (jnp.argmax(logits, axis=-1) == labels) & counts
        total = -jnp.where(counts, chosen, 0.0).sum()
        count = counts.sum().astype(logits.dtype)
        return Total(total, count, {"accuracy": right.sum().astype(logits.dtype)})

    return loss
