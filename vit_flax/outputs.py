"""The output classes under Transformers' Flax names, as JAX pytrees."""

from __future__ import annotations

from dataclasses import fields

import jax

from vit_common import outputs as common


class FlaxBaseModelOutput(common.BaseModelOutput):
    __doc__ = common.BaseModelOutput.__doc__


class FlaxBaseModelOutputWithPooling(common.BaseModelOutputWithPooling):
    __doc__ = common.BaseModelOutputWithPooling.__doc__


class FlaxSequenceClassifierOutput(common.ImageClassifierOutput):
    __doc__ = common.ImageClassifierOutput.__doc__


class FlaxMaskedImageModelingOutput(common.MaskedImageModelingOutput):
    __doc__ = common.MaskedImageModelingOutput.__doc__


class FlaxDeiTForImageClassificationWithTeacherOutput(
    common.DeiTForImageClassificationWithTeacherOutput
):
    __doc__ = common.DeiTForImageClassificationWithTeacherOutput.__doc__


class FlaxMaskedLMOutput(common.MaskedLMOutput):
    __doc__ = common.MaskedLMOutput.__doc__


for _class in (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxSequenceClassifierOutput,
    FlaxMaskedImageModelingOutput,
    FlaxDeiTForImageClassificationWithTeacherOutput,
    FlaxMaskedLMOutput,
):
    jax.tree_util.register_dataclass(
        _class, data_fields=[f.name for f in fields(_class)], meta_fields=[]
    )
