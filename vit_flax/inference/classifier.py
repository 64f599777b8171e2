"""`ImageClassifier`: labels with probabilities for images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.checks import check_positive
from vit_common.errors import ConfigError, NoClassifierError
from vit_common.flops import forward_flops
from vit_common.images.predictions import (
    Prediction,
    are_many,
    has_several_labels,
    likeliest,
)
from vit_convert.source import Source
from vit_flax.inference.encoder import ImageEncoder, Pool, Work
from vit_flax.inference.stream import Result, values_of

PROBABILITIES = Work("probabilities")


class ImageClassifier(ImageEncoder):
    """Labels with probabilities for images.

    Probabilities are the softmax of the logits in float32, or their sigmoid where the classes do
    not exclude each other (`problem_type` "multi_label_classification", or a single label).

    Args:
        model: the network with its parameters.
        *args, **kwargs: as `ImageEncoder`.

    Raises:
        ConfigError: the model does not classify, or does not take what the processor makes.

    Example:
        >>> classify = ImageClassifier.from_pretrained("google/vit-base-patch16-224")
        >>> classify("cat.jpg", top_k=1)[0].label
        'Egyptian cat'
        >>> probabilities = classify.run(classify.prepare(["cat.jpg", "dog.jpg"]))  # (2, 1000)
        >>> classify.predictions(probabilities, top_k=1)[0][0].label
        'Egyptian cat'
    """

    _output = "probabilities"

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config.problem_type == "regression":
            raise ConfigError(
                "config: `problem_type` is 'regression': this model predicts a quantity; wanted a "
                "model of classes."
            )
        super().__init__(model, *args, **kwargs)
        self.several = has_several_labels(model.config)

    @classmethod
    def _check_source(cls, source: Source) -> None:
        if not source.classifies:
            raise NoClassifierError(
                f"{source.path}: these weights have no classifier, so predictions would be random; "
                "wanted a checkpoint that was trained or fine-tuned to classify."
            )

    @property
    def _names(self) -> Mapping[int, str] | Sequence[str]:
        """The label of each class."""
        return self.config.id2label

    def __call__(self, images: Any, top_k: int = 5) -> Any:
        """Classify one image or a list of images.

        Args:
            images: as in `prepare`: an image file (its name, its bytes, or open for reading), PIL
                image or array; or a list of these, or an array of several.
            top_k: how many classes to return; all if there are fewer.

        Returns:
            A tuple of `Prediction`, best first; for a list, a list of these.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: `top_k` is not a positive integer.
        """
        many = are_many(images)
        results = self.stream(images if many else [images], top_k=top_k)
        predictions = values_of(results)
        return predictions if many else predictions[0]

    def stream(
        self, images: Iterable[Any], top_k: int = 5, batch_size: int | None = None
    ) -> Generator[Result, None, None]:
        """Classify any number of images; results come in order, as they are ready.

        A few batches are in memory at most, however many images there are: those that the device
        works on, and those that threads decode for it. An image that cannot be read gives a
        `Result` with its error, and the stream goes on. `timings` then tells where the time went.

        Args:
            images: each as in a call.
            top_k: how many classes to return; all if there are fewer.
            batch_size: images that go through the model at once; a last batch of fewer is padded,
                so that nothing is compiled for it.

        Raises:
            InputError: `top_k` or `batch_size` is not a positive integer. At once, not with the
                first result.
        """
        top_k = check_positive("top_k", top_k)
        return self._checked_stream(
            images,
            batch_size,
            PROBABILITIES,
            lambda rows: likeliest(rows[0], self._names, top_k),
        )

    def predictions(
        self, probabilities: np.ndarray, top_k: int = 5
    ) -> list[tuple[Prediction, ...]]:
        """The likeliest classes for each row that `run` gives, best first.

        Args:
            probabilities: (B, K).
            top_k: how many classes to return; all if there are fewer.

        Raises:
            InputError: `top_k` is not a positive integer.
        """
        top_k = check_positive("top_k", top_k)
        return [likeliest(row, self._names, top_k) for row in np.asarray(probabilities)]

    def compile(self, batch_size: int | None = None) -> None:
        """Compile what `stream` and calls need for any number of images: every power of two up to
        `batch_size`, and that. A last batch of few images is then run in the smallest that holds
        it. Without this each size is compiled when a stream begins with so many images."""
        batch_size = self.default_batch_size if batch_size is None else batch_size
        batch_size = check_positive("batch_size", batch_size)
        self._add(PROBABILITIES)
        self.engine.compile_all(PROBABILITIES, batch_size)

    @property
    def flops(self) -> int:
        """Floating point operations in the matrix products of one image: see `vit_common.flops`."""
        front = None if self.model.scan_layers else self.model.head_tokens
        return forward_flops(
            self.config, self.model.head, front_tokens=front, image_size=self.image_size
        )

    def runner(self, batch_size: int) -> Callable[[np.ndarray], np.ndarray]:
        """The network alone, compiled for one size of batch: from prepared pixels (B, C, H, W) to
        probabilities (B, K) of float32, both in the host's memory."""
        batch_size = check_positive("batch_size", batch_size)
        self._add(PROBABILITIES)
        self.engine.compile_ahead(PROBABILITIES, batch_size)
        return lambda pixels: self.engine.start(PROBABILITIES, pixels, batch_size).rows()[0]

    def _work(self, output: Any, layers: Iterable[int], pool: Pool) -> Work:
        return PROBABILITIES if output == "probabilities" else super()._work(output, layers, pool)

    def _values(self, work: Work, params: Any, pixel_values: jax.Array) -> list[jax.Array]:
        if work.kind != "probabilities":
            return super()._values(work, params, pixel_values)
        model = self.model.with_front_tokens(self.model.head_tokens)
        output = model(
            pixel_values,
            params=params,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        logits = output.logits.astype(jnp.float32)  # (B, K)
        return [jax.nn.sigmoid(logits) if self.several else jax.nn.softmax(logits, axis=-1)]
