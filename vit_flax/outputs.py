"""The output classes under Transformers' Flax names, as JAX pytrees."""

from __future__ import annotations

from typing import Any

import jax
from flax import serialization

from vit_common import outputs as common


class FlaxBaseModelOutput(common.BaseModelOutput):
    __doc__ = common.BaseModelOutput.__doc__


class FlaxBaseModelOutputWithPooling(common.BaseModelOutputWithPooling):
    __doc__ = common.BaseModelOutputWithPooling.__doc__


class FlaxBeitModelOutputWithPooling(FlaxBaseModelOutputWithPooling):
    __doc__ = common.BaseModelOutputWithPooling.__doc__


class FlaxSequenceClassifierOutput(common.ImageClassifierOutput):
    __doc__ = common.ImageClassifierOutput.__doc__


class FlaxCLIPVisionModelOutput(common.CLIPVisionModelOutput):
    __doc__ = common.CLIPVisionModelOutput.__doc__


class FlaxCLIPTextModelOutput(common.CLIPTextModelOutput):
    __doc__ = common.CLIPTextModelOutput.__doc__


class FlaxCLIPOutput(common.CLIPOutput):
    __doc__ = common.CLIPOutput.__doc__


class FlaxSiglipOutput(common.SiglipOutput):
    __doc__ = common.SiglipOutput.__doc__


class FlaxSiglip2Output(common.Siglip2Output):
    __doc__ = common.Siglip2Output.__doc__


class FlaxMaskedImageModelingOutput(common.MaskedImageModelingOutput):
    __doc__ = common.MaskedImageModelingOutput.__doc__


class FlaxDeiTForImageClassificationWithTeacherOutput(
    common.DeiTForImageClassificationWithTeacherOutput
):
    __doc__ = common.DeiTForImageClassificationWithTeacherOutput.__doc__


class FlaxMaskedLMOutput(common.MaskedLMOutput):
    __doc__ = common.MaskedLMOutput.__doc__


def _flatten(output: common.ModelOutput) -> tuple[tuple[Any, ...], None]:
    return tuple(getattr(output, name) for name in common.field_names(type(output))), None


def _flatten_with_keys(output: common.ModelOutput) -> tuple[tuple[Any, ...], None]:
    names = common.field_names(type(output))
    return tuple((jax.tree_util.GetAttrKey(name), getattr(output, name)) for name in names), None


def _to_state(output: common.ModelOutput) -> dict[str, Any]:
    names = common.field_names(type(output))
    return {name: serialization.to_state_dict(getattr(output, name)) for name in names}


def _from_state(output: common.ModelOutput, state: dict[str, Any]) -> common.ModelOutput:
    names = common.field_names(type(output))
    return type(output).from_fields(
        serialization.from_state_dict(getattr(output, name), state[name], name=name)
        for name in names
    )


for _class in (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxBeitModelOutputWithPooling,
    FlaxSequenceClassifierOutput,
    FlaxCLIPVisionModelOutput,
    FlaxCLIPTextModelOutput,
    FlaxCLIPOutput,
    FlaxSiglipOutput,
    FlaxSiglip2Output,
    FlaxMaskedImageModelingOutput,
    FlaxDeiTForImageClassificationWithTeacherOutput,
    FlaxMaskedLMOutput,
):
    jax.tree_util.register_pytree_with_keys(
        _class,
        _flatten_with_keys,
        lambda _, values, cls=_class: cls.from_fields(values),  # type: ignore[misc]
        _flatten,
    )
    serialization.register_serialization_state(_class, _to_state, _from_state)
