"""DeiT: the network of `vit_flax.model` with two tokens in front, and its heads.

Names, calls and outputs follow the PyTorch classes of Transformers 4.57.6, which has none in Flax.
"""

from __future__ import annotations

from typing import Any

import jax

from vit_common.checks import Interpolate
from vit_common.families import DeiTConfig
from vit_flax.model import (
    FlaxDeiTForImageClassificationWithTeacherModule,
)
from vit_flax.params import Params
from vit_flax.pretrained import (
    FlaxViTForImageClassification,
    FlaxViTForMaskedImageModeling,
    FlaxViTModel,
    FlaxViTPreTrainedModel,
)


class FlaxDeiTPreTrainedModel(FlaxViTPreTrainedModel):
    """Base of the distilled DeiT's models; see `FlaxViTPreTrainedModel`."""

    config_class = DeiTConfig
    base_model_prefix = "deit"


class FlaxDeiTModel(FlaxDeiTPreTrainedModel, FlaxViTModel):
    """The base network of a distilled DeiT; see `FlaxViTModel`."""


class FlaxDeiTForImageClassification(FlaxDeiTPreTrainedModel, FlaxViTForImageClassification):
    """A distilled DeiT with one classifier, on the class token; see
    `FlaxViTForImageClassification`. Published checkpoints have two: use
    `FlaxDeiTForImageClassificationWithTeacher` for them."""


class FlaxDeiTForMaskedImageModeling(FlaxDeiTPreTrainedModel, FlaxViTForMaskedImageModeling):
    """A distilled DeiT with a decoder back to pixels; see `FlaxViTForMaskedImageModeling`."""


class FlaxDeiTForImageClassificationWithTeacher(FlaxDeiTPreTrainedModel):
    """A distilled DeiT with two classifiers, on the class and on the distillation token; the logits
    are their mean."""

    module_class = FlaxDeiTForImageClassificationWithTeacherModule
    head = "teacher"

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`.

        Returns:
            `FlaxDeiTForImageClassificationWithTeacherOutput`, or its tuple with
            `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        return self._call(
            pixel_values,
            params,
            dropout_rng,
            train,
            (output_attentions, output_hidden_states, return_dict),
            interpolate_pos_encoding,
            {"head_mask": head_mask},
        )
