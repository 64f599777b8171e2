"""A head on a frozen network: what the head looks at is computed once, and training sees no image
again.

That is possible where an image is always prepared in the same way, or in one of two: as it is, or
mirrored. The rows of the two are drawn for each (seed, epoch, image), as augmentation is. What the
head sees may be standardised over the training images, as the batch norm without parameters does
before the linear probe of MAE (He et al. 2021, arXiv:2111.06377, appendix A.1); the head that comes
out has the shift and the scale folded into it, and needs neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from vit_common.augment import draws
from vit_common.datasets import occurrences
from vit_common.errors import ImageError, InputError
from vit_common.recipes import Recipe
from vit_flax.outputs import FlaxSequenceClassifierOutput
from vit_flax.training.evaluate import Evaluation, Evaluator
from vit_flax.training.loader import Loader, as_batch

_LEAST = 1e-6  # standard deviation of an input that is taken to vary


def changes_images(recipe: Recipe) -> list[str]:
    """The settings that keep the head's inputs from being computed once. (Dropout and drop path
    that a model has of itself do not: a network that does not train runs as it predicts.)"""
    off: dict[str, Any] = {
        "crop_scale": None,
        "affine": None,
        "color_jitter": 0.0,
        "auto_augment": None,
        "erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    }
    found = [name for name, value in off.items() if getattr(recipe, name) != value]
    return found + [name for name in ("dropout", "drop_path") if getattr(recipe, name)]


def head_inputs(model: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, pixel_values (B, C, H, W)) -> what the classifier looks at, (B, W) float32."""
    width: int = model.config.classifier_width
    config = copy.deepcopy(model.config)
    config.num_labels = width
    # The same network, with a classifier that gives what it is given.
    module = model.module.clone(config=config)
    dtype = model.param_dtype
    identity = {"kernel": jnp.eye(width, dtype=dtype), "bias": jnp.zeros(width, dtype)}

    def run(params: Any, pixel_values: jax.Array) -> jax.Array:
        params = {**unfreeze(params), "classifier": identity}
        images = jnp.transpose(pixel_values, (0, 2, 3, 1))
        flags = (False, False, True)  # attentions, hidden states, an output with names
        output = module.apply({"params": params}, images, True, *flags)
        return output.logits.astype(jnp.float32)

    return run


class FrozenNetwork:
    """A classifier whose head alone trains.

    Args:
        model: with one linear classifier, "classifier".
        recipe: what is drawn of each image, and whether inputs are standardised.
        processor: prepares the images.
        loader: of the training images; it says their order.
        mesh: devices, with the axes that `Evaluator` takes.

    Attributes:
        skipped: (name, message) of each training image that could not be read.
        workers: threads that read images.
        progress: told how many images are done, of how many, where inputs are computed.
        params: of the head as training begins with it; it sees standardised inputs if the recipe
            says so.
    """

    def __init__(
        self, model: Any, recipe: Recipe, processor: Any, loader: Loader, mesh: Any
    ) -> None:
        self.model, self.recipe, self.loader = model, recipe, loader
        self.skipped, self.workers = loader.skipped, loader.workers
        self._evaluator = _Inputs(model, processor, mesh=mesh, workers=loader.workers)
        self.progress: Callable[[int, int], object] | None = None
        self._rows: np.ndarray | None = None
        self._good = np.zeros(0, bool)
        self._statistics: tuple[np.ndarray, np.ndarray] | None = None
        self._validation: tuple[Any, ...] | None = None

    @property
    def shapes(self) -> Any:
        """The head's parameters without their values."""
        return {"classifier": {k: jnp.zeros_like(leaf) for k, leaf in self._head.items()}}

    @property
    def params(self) -> Any:
        mean, deviation = self.statistics
        head = {name: np.asarray(leaf, np.float64) for name, leaf in self._head.items()}
        kernel = head["kernel"] * deviation[:, None]
        bias = head["bias"] + mean @ head["kernel"]
        dtype = np.promote_types(self._head["kernel"].dtype, np.float32)
        return {"classifier": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}

    @property
    def _head(self) -> Any:
        return self.model.network_params["classifier"]

    def whole(self, params: Any) -> Any:
        """The parameters of the model, from those of the head in training."""
        mean, deviation = self.statistics
        head = params["classifier"]
        kernel = head["kernel"] / np.asarray(deviation, head["kernel"].dtype)[:, None]
        shift = np.asarray(mean, kernel.dtype) @ kernel
        return {
            **unfreeze(self.model.network_params),
            "classifier": {"kernel": kernel, "bias": head["bias"] - shift},
        }

    @staticmethod
    def outputs(params: Any, batch: Any, key: jax.Array) -> FlaxSequenceClassifierOutput:
        """What the step runs: the head alone."""
        del key
        head = params["classifier"]
        dtype = jnp.promote_types(batch["pixel_values"].dtype, head["kernel"].dtype)
        inputs = batch["pixel_values"].astype(dtype)
        return FlaxSequenceClassifierOutput(logits=inputs @ head["kernel"] + head["bias"])

    # -- the training images

    def _compute(self) -> None:
        """The inputs of every training image, (1 or 2, N, W): as it is, and mirrored."""
        if self._rows is not None:
            return
        dataset = self.loader.dataset
        sides = [False] if self.recipe.flip == 0.0 else [False, True]
        sides = [True] if self.recipe.flip == 1.0 else sides
        found = []
        for mirrored in sides:
            self._evaluator.mirrored = mirrored
            rows, index, skipped = self._evaluator.outputs(dataset, progress=self.progress)
            whole = np.zeros((len(dataset), rows.shape[1]), np.float32)
            whole[index] = rows
            found.append(whole)
        self._good = np.isin(np.arange(len(dataset)), index)
        known = {name for name, _ in self.loader.skipped}
        self.loader.skipped += [each for each in skipped if each[0] not in known]
        if not self._good.any():
            raise ImageError(
                f"none of the {len(dataset)} images could be read. The first: "
                f"{self.loader.skipped[0][1]}"
            )
        self._rows = np.stack(found)

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each input, (W,) float64; 0 and 1 where the recipe does
        not standardise."""
        if self._statistics is None:
            width = self.model.config.classifier_width
            mean, deviation = np.zeros(width), np.ones(width)
            if self.recipe.standardize:
                self._compute()
                assert self._rows is not None
                rows = self._rows[:, self._good].reshape(-1, width).astype(np.float64)
                mean, deviation = rows.mean(axis=0), rows.std(axis=0)
                deviation = np.where(deviation > _LEAST, deviation, 1.0)
            self._statistics = mean, deviation
        return self._statistics

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """As `Loader.batches`, with the head's inputs (B, W) float32 for "pixel_values"."""
        self._compute()
        assert self._rows is not None
        mean, deviation = self.statistics
        loader, dataset = self.loader, self.loader.dataset
        order = loader.order(epoch)
        count, n = occurrences(order), len(order)
        for step in range(start, loader.steps_per_epoch):
            places = step * loader.batch_size + np.arange(loader.rows.start, loader.rows.stop)
            index = order[places % n]
            side = np.zeros(len(index), int)
            if len(self._rows) == 2:
                side = np.array(
                    [
                        draws(loader.seed, epoch, int(i), int(count[place])).random()
                        < self.recipe.flip
                        for i, place in zip(index, places % n, strict=True)
                    ],
                    int,
                )
            rows = (self._rows[side, index] - mean) / deviation
            good = self._good[index]
            yield as_batch(dataset, index, places < n, good, rows.astype(np.float32))

    # -- the validation

    def evaluate(self, dataset: Any, head: Any) -> Evaluation:
        """Evaluate the model with a head.

        Args:
            dataset: the same each time.
            head: the parameters of the model's classifier, on this host.
        """
        if self._validation is None:
            self._evaluator.mirrored = False
            self._validation = self._evaluator.outputs(dataset, progress=self.progress)
        rows, index, skipped = self._validation
        kernel = np.asarray(head["kernel"], np.float32)
        logits = rows @ kernel + np.asarray(head["bias"], np.float32)
        return self._evaluator.judged(dataset, logits, index, skipped)


class _Inputs(Evaluator):
    """Evaluates a model up to its classifier."""

    mirrored = False

    def __init__(self, model: Any, processor: Any, **options: Any) -> None:
        self._until = head_inputs(model)
        super().__init__(model, processor, **options)

    def _logits(self, params: Any, pixel_values: jax.Array, valid: jax.Array) -> Any:
        return self._until(params, pixel_values), valid

    def _placed(self, pixels: np.ndarray, valid: np.ndarray) -> list[Any]:
        return super()._placed(pixels[..., ::-1] if self.mirrored else pixels, valid)


def frozen(
    recipe: Recipe,
    model: Any,
    processor: Any,
    loader: Loader,
    mesh: Any,
    say: Callable[[str], object] = lambda line: None,
) -> FrozenNetwork | None:
    """The frozen network, if the recipe trains the head alone and draws nothing else of an image
    than whether it is mirrored; else None.

    Raises:
        InputError: a user asked for standardised inputs, and they cannot be computed once.
    """
    alone = recipe.train == "head" and recipe.task == "classify" and not recipe.lora
    why = "the network trains, too (wanted train=head)"
    if alone:
        hinder = changes_images(recipe)
        why = f"each epoch draws other ones ({', '.join(hinder)})" if hinder else ""
        why = why if "classifier" in model.network_params else "this model has two heads"
    if not why:
        say("the head alone trains: its inputs are computed once for each image")
        return FrozenNetwork(model, recipe, processor, loader, mesh)
    if recipe.standardize:
        line = f"`standardize`: the head's inputs cannot be computed once: {why}"
        if not recipe.is_usual("standardize"):
            raise InputError(f"{line}. Leave it out.")
        say(f"{line}; they are taken as they are")
    return None
