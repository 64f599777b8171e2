"""BEiT: the network of `vit_flax.model` with the fields of its configuration.

Names, calls and outputs are those of the Flax classes of Transformers 4.57.6.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from vit_common.checks import Interpolate, check_rank, check_token_labels
from vit_common.families import BeitConfig
from vit_flax.arguments import as_array, values_of
from vit_flax.model import (
    FlaxBeitForMaskedImageModelingModule,
    FlaxViTForImageClassificationModule,
    FlaxViTModule,
)
from vit_flax.outputs import FlaxBeitModelOutputWithPooling
from vit_flax.params import Params
from vit_flax.pretrained import (
    FlaxViTForImageClassification,
    FlaxViTModel,
    FlaxViTPreTrainedModel,
)


class FlaxBeitPreTrainedModel(FlaxViTPreTrainedModel):
    """Base of BEiT's models; see `FlaxViTPreTrainedModel`. Images of any size are taken: positions
    and position biases are resampled."""

    config_class = BeitConfig
    base_model_prefix = "beit"


class FlaxBeitModule(FlaxViTModule):
    """The base network of BEiT; see `FlaxViTModule`."""

    output_class = FlaxBeitModelOutputWithPooling


class FlaxBeitForImageClassificationModule(FlaxViTForImageClassificationModule):
    """BEiT and a classifier; see `FlaxViTForImageClassificationModule`."""


class FlaxBeitModel(FlaxBeitPreTrainedModel, FlaxViTModel):
    """The base network of BEiT; its pooled output is the mean of the patches through a norm, or the
    class token. See `FlaxViTModel`; `bool_masked_pos` comes second, as in Transformers."""

    module_class = FlaxBeitModule

    def __call__(  # type: ignore[override]
        self, pixel_values: Any, bool_masked_pos: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`, but `bool_masked_pos` is the second."""
        return FlaxViTModel.__call__(
            self, pixel_values, *args, bool_masked_pos=bool_masked_pos, **kwargs
        )


class FlaxBeitForImageClassification(FlaxBeitPreTrainedModel, FlaxViTForImageClassification):
    """BEiT with a linear classifier on the pooled output; see `FlaxViTForImageClassification`."""

    module_class = FlaxBeitForImageClassificationModule

    def __call__(  # type: ignore[override]
        self, pixel_values: Any, bool_masked_pos: None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the network; arguments as `FlaxViTForImageClassification`, but the second place is
        that of `bool_masked_pos`, which Transformers takes there and does not use."""
        return FlaxViTForImageClassification.__call__(self, pixel_values, *args, **kwargs)


class FlaxBeitForMaskedImageModeling(FlaxBeitPreTrainedModel):
    """BEiT with the prediction of a visual token for each patch."""

    module_class = FlaxBeitForMaskedImageModelingModule
    head = "tokens"

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        bool_masked_pos: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`, and

        Args:
            labels: visual tokens, (B, N), or those of the masked patches alone, one after the
                other; then `loss`, over the masked patches, is in the output.

        Returns:
            `FlaxMaskedLMOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        pixel_values = as_array("pixel_values", pixel_values)
        check_rank(pixel_values, "(batch, channels, height, width)")
        if labels is not None:
            labels = self._spread(labels, bool_masked_pos, pixel_values.shape)
        return self._call(
            pixel_values,
            params,
            dropout_rng,
            train,
            (output_attentions, output_hidden_states, return_dict),
            interpolate_pos_encoding,
            {"bool_masked_pos": bool_masked_pos, "head_mask": head_mask, "labels": labels},
        )

    def _spread(self, labels: Any, mask: Any, shape: tuple[int, ...]) -> Any:
        """Labels of the masked patches alone as (B, N), where their values are known."""
        values = values_of("labels", labels)
        if values is None or values.ndim != 1:
            return labels
        known = None if mask is None else values_of("bool_masked_pos", mask)
        P = self.config.patch_height_width
        patches = (shape[0], shape[2] // P[0] * (shape[3] // P[1]))
        check_token_labels(values, known, patches)
        assert known is not None
        spread = np.full(patches, -100, values.dtype)
        spread[known != 0] = values
        return spread
