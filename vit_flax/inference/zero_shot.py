"""`ZeroShotClassifier`: which of several texts fits an image, by a model of images and texts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, ConfigError
from vit_common.files.labels import texts_of
from vit_common.files.tokenizer import Tokenizer
from vit_common.flops import forward_flops
from vit_common.images.processor import BaseImageProcessor
from vit_convert.source import Source
from vit_flax.auto import FlaxAutoModel
from vit_flax.families.towers import unit
from vit_flax.inference.classifier import PROBABILITIES, ImageClassifier
from vit_flax.inference.encoder import Work
from vit_flax.sharding import replicated

_TEXT_TOWER = ("text_model", "text_projection")
_TEXTS_AT_ONCE = 64


class ZeroShotClassifier(ImageClassifier):
    """Probabilities of texts for images, by a model of both such as CLIP or SigLIP: a classifier
    whose classes are named, not trained.

    The features of the texts are computed once; images go through the image tower as through an
    `ImageClassifier`, whose calls this class has. Probabilities come from the scaled cosines in
    float32: CLIP's are their softmax over the texts (Radford et al. 2021, arXiv:2103.00020, figure
    3), SigLIP's the sigmoid of each by itself (Zhai et al. 2023, arXiv:2303.15343).

    Args:
        model: a model of images and texts, with its parameters.
        image_processor: as `ImageEncoder`.
        tokenizer: turns texts into tokens; a `Tokenizer`, a folder or a name on the Hub.
        labels: the texts, each once, at least two for CLIP; or a file of them, one per line or
            JSON.
        template: what each label is put into, at its `{}`: "a photo of a {}".
        **kwargs: as `ImageEncoder`.

    Attributes:
        labels: the labels, as they were given.
        texts: the same in the template, as the text tower reads them.
        text_features: (K, projection_dim), each of length one.

    Warns:
        UserWarning: a text is longer than the text tower takes, and its end was cut off.

    Raises:
        InputError: the labels or the template are none.
        ConfigError: the model takes no texts, or not what the processor makes.
        MissingFileError: the tokenizer is not found.

    Example:
        >>> classify = ZeroShotClassifier.from_pretrained(
        ...     "openai/clip-vit-base-patch32", labels=["cat", "dog"], template="a photo of a {}"
        ... )
        >>> classify("cat.jpg", top_k=1)[0].label
        'cat'
    """

    _OWN: ClassVar = (*ImageClassifier._OWN, "tokenizer", "labels", "template")

    def __init__(
        self,
        model: Any,
        image_processor: BaseImageProcessor | None = None,
        *,
        tokenizer: Tokenizer | str | os.PathLike,
        labels: Sequence[str] | str | os.PathLike,
        template: str = "{}",
        **kwargs: Any,
    ) -> None:
        if model.head != "towers":
            raise ConfigError(
                f"{type(model).__name__} takes no texts; wanted a model of images and texts, such "
                "as FlaxCLIPModel."
            )
        self.labels, self.texts = _texts(model.config, labels, template)
        super().__init__(model, image_processor, **kwargs)
        self.several = _is_sigmoid(model.config)
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.text_features = self._encoded(self.engine.params)
        # The text tower is not needed any more; the features of the texts are.
        kept = {n: p for n, p in self.engine.params.items() if n not in _TEXT_TOWER}
        self.engine.params = {**kept, "text_features": self._placed(self.text_features)}

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | os.PathLike,
        labels: Sequence[str] | str | os.PathLike,
        dtype: Any = jnp.float32,
        *,
        template: str = "{}",
        tokenizer: Tokenizer | str | os.PathLike | None = None,
        **options: Any,
    ) -> Self:
        """Load model, preprocessing and tokenizer.

        Args:
            name_or_path: directory, weights file, or "owner/name" on the Hub.
            labels, template: as for the class.
            dtype: compute dtype: float32, bfloat16 or float16.
            tokenizer: folder or name on the Hub of the tokenizer; None is the model's own.
            **options: as `ImageEncoder.from_pretrained`.

        Warns:
            UserWarning: there is no `preprocessor_config.json`, so the defaults are used; or a text
                is too long, and its end was cut off.

        Raises:
            InputError: the labels or the template are none.
            MissingFileError: there is nothing of that name, or no tokenizer, or it cannot be
                reached.
            ConfigError: the configuration is not of this architecture.
            CheckpointError: the weights are corrupt, do not fit, or have no text tower.
        """
        texts_of(labels, template)  # before anything is fetched
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer(tokenizer)
        own: dict[str, Any] = {"labels": labels, "template": template, "tokenizer": tokenizer}
        return super().from_pretrained(name_or_path, dtype, **options, **own)

    @classmethod
    def _check_source(cls, source: Source) -> None:
        if source.head != "towers":
            if "text_model.final_layernorm.weight" in source.mapped.tensors:
                raise CheckpointError(
                    f"{source.path}: these weights have a text tower, and nothing says how many "
                    "heads it has; wanted a folder with a config.json, or in Python `config=` of "
                    "both towers: see `vit_common.presets.preset('clip-base-32')`."
                )
            raise CheckpointError(
                f"{source.path}: these weights have no text tower, so there is nothing to compare "
                "images with; wanted a whole model of images and texts, such as "
                "openai/clip-vit-base-patch32."
            )

    @classmethod
    def _arguments(cls, source: Source, own: dict[str, Any]) -> dict[str, Any]:
        _texts(source.config, own["labels"], own["template"])  # before weights are read
        if own["tokenizer"] is None:
            return {**own, "tokenizer": Tokenizer(source.files)}
        return own

    @property
    def _names(self) -> Sequence[str]:
        return self.labels

    @classmethod
    def _load_model(cls, source: Source, **options: Any) -> Any:
        return FlaxAutoModel.from_source(source, **options)

    @property
    def flops(self) -> int:
        """Floating point operations in the matrix products of one image: see `vit_common.flops`.
        Those of the texts, once for all images, are not among them."""
        tower = forward_flops(self.config, "projection", image_size=self.image_size)
        return tower + 2 * self.text_features.size

    def _encoded(self, params: Mapping[str, Any]) -> np.ndarray:
        """The features of the texts, (K, projection_dim), float32."""
        config = self.config.text_config
        most = config.max_position_embeddings
        # SigLIP was trained on texts that are filled up, and attends to all of a text.
        filled = _is_sigmoid(self.config)
        found, cut = [], []
        for start in range(0, len(self.texts), _TEXTS_AT_ONCE):
            texts = self.texts[start : start + _TEXTS_AT_ONCE]
            tokens = self.tokenizer(texts, most=most, to=most if filled else None)
            cut += [start + i for i in tokens.cut]
            if tokens.input_ids.max(initial=0) >= config.vocab_size:
                raise ConfigError(
                    f"{self.tokenizer.name}: this tokenizer has the token "
                    f"{tokens.input_ids.max()}, and the model's text tower {config.vocab_size} "
                    "tokens; wanted the tokenizer of this model."
                )
            mask = None if filled else tokens.attention_mask
            embeds = self.model.get_text_features(tokens.input_ids, mask, params=params)
            found.append(np.asarray(unit(embeds.astype(jnp.float32))))
        if cut:
            some = "; ".join(repr(self.texts[i]) for i in cut[:3])
            warnings.warn(
                f"{len(cut)} of {len(self.texts)} texts have more than {most} tokens, and their "
                f"end was cut off: {some}" + ("; ..." if len(cut) > 3 else ""),
                UserWarning,
                stacklevel=2,
            )
        return np.concatenate(found)

    def _placed(self, array: np.ndarray) -> jax.Array:
        if self.engine.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, replicated(self.engine.mesh))

    def _values(self, work: Work, params: Any, pixel_values: jax.Array) -> list[jax.Array]:
        if work != PROBABILITIES:
            return super()._values(work, params, pixel_values)
        network = {name: leaf for name, leaf in params.items() if name != "text_features"}
        embeds = self.model.module.apply(
            {"params": network},
            pixel_values.transpose(0, 2, 3, 1),  # (B, H, W, C)
            method="image_features",
        )
        images = unit(embeds.astype(jnp.float32))
        product = jnp.matmul(images, params["text_features"].T, precision="highest")
        logits = self.model.module.apply({"params": network}, product, method="scaled")
        return [jax.nn.sigmoid(logits) if self.several else jax.nn.softmax(logits, axis=-1)]


def _is_sigmoid(config: ViTConfig) -> bool:
    """Whether each text is judged by itself, not beside the others."""
    return config.base_family.startswith("siglip")


def _texts(config: ViTConfig, labels: Any, template: Any) -> tuple[list[str], list[str]]:
    return texts_of(labels, template, least=1 if _is_sigmoid(config) else 2)
