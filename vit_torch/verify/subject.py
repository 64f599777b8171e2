"""A checkpoint under comparison: its configuration, and its model in either twin when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_common.checks import resolve_problem_type
from vit_common.config import ViTConfig, as_config
from vit_common.errors import ConfigError, InputError
from vit_common.parameters import class_name
from vit_convert.source import find_processor, open_source


class Subject:
    """A checkpoint, and its models when asked for."""

    def __init__(
        self,
        name: Any,
        format: str | None,
        hub: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        ignore: Iterable[str] = (),
    ) -> None:
        self.ignore = tuple(ignore)
        self.name, self.format, self.hub = name, format, dict(hub)
        with open_source(name, format=format, overrides=overrides, **hub) as source:
            self.config: ViTConfig = source.config
            self.head = source.head
            self.pooled = any(key.startswith("pooler.") for key in source.mapped.tensors)
            self.masked = "embeddings.mask_token" in source.mapped.tensors
            found = find_processor(source)
            self.format = source.table.name
        if self.config.is_text:
            raise InputError(
                f"{name}: the weights must be of a network that images go through; these are of "
                f"{self.config.model_type!r}, which texts go through."
            )
        if self.head == "towers":  # of a network of images and texts, what images go through
            tower = self.config.sub_configs["vision_config"]
            self.config, self.head = as_config(self.config, tower), None
        self.processor = None if found is None else found[0]

    def check_like(self, other: Subject, but: tuple[str, ...] = ()) -> None:
        """Raise ConfigError unless both take the same inputs and are of one size."""
        sizes = (
            "image_size",
            "num_channels",
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "patch_size",
            "num_labels",
        )
        odd = [
            f"{name} {getattr(self.config, name)!r} and {getattr(other.config, name)!r}"
            for name in sizes
            if name not in but and getattr(self.config, name) != getattr(other.config, name)
        ]
        if self.head != other.head:
            odd.append(f"head {self.head!r} and {other.head!r}")
        elif self.problem_type != other.problem_type:
            odd.append(f"problem_type {self.problem_type!r} and {other.problem_type!r}")
        if odd:
            raise ConfigError(
                f"{self.name} and {other.name} are not versions of one network: {'; '.join(odd)}."
            )

    @property
    def problem_type(self) -> str | None:
        """What the classifier's loss is; None without one."""
        return resolve_problem_type(self.config, True) if self.head == "classifier" else None

    def differences(self, other: Subject) -> list[str]:
        """What the configurations do not have in common."""
        names = [
            name
            for name in self.config.fields
            if name not in ("architectures", "id2label", "label2id", "dtype")
            and getattr(self.config, name) != getattr(other.config, name)
        ]
        if not names:
            return []
        pairs = [
            f"{name} ({getattr(self.config, name)!r} and {getattr(other.config, name)!r})"
            for name in names
        ]
        return [f"the configurations differ in {', '.join(pairs)}"]

    def _class(self, module: Any, flax: str) -> Any:
        return getattr(module, flax + class_name(self.config, self.head))

    def _options(self) -> dict[str, Any]:
        plain = self.head is None and self.config.base_family in ("vit", "deit")
        parts = {"add_pooling_layer": self.pooled, "use_mask_token": self.masked} if plain else {}
        return {**parts, "ignore": self.ignore}

    def torch(self, dtype: str, attn_implementation: str = "eager") -> Any:
        """The PyTorch twin."""
        import vit_torch

        return self._class(vit_torch, "").from_pretrained(
            self.name,
            config=self.config,
            format=self.format,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **self._options(),
            **self.hub,
        )

    def flax(self, dtype: str, precision: str) -> Any:
        """The Flax twin."""
        import vit_flax

        return self._class(vit_flax, "Flax").from_pretrained(
            self.name,
            dtype=dtype,
            param_dtype=dtype,
            precision=None if precision == "default" else precision,
            config=self.config,
            format=self.format,
            **self._options(),
            **self.hub,
        )

    def extra_inputs(self, batch: int, size: tuple[int, int]) -> dict[str, Any]:
        """What the head needs to have a loss."""
        rng = np.random.default_rng(1)
        P = self.config.patch_height_width
        patches = size[0] // P[0] * (size[1] // P[1])
        if self.head == "classifier":
            classes = self.config.num_labels
            if self.problem_type != "single_label_classification":
                return {"labels": rng.integers(0, 2, (batch, classes)).astype(np.float32)}
            if classes > 1:  # of one class the loss is zero, whatever the network
                return {"labels": rng.integers(0, classes, batch)}
        elif self.head == "decoder":
            return {"bool_masked_pos": rng.integers(0, 2, (batch, patches))}
        elif self.head == "tokens":
            vocabulary = self.config.vocab_size
            return {
                "bool_masked_pos": rng.integers(0, 2, (batch, patches)),
                "labels": rng.integers(0, vocabulary, (batch, patches)),
            }
        return {}
