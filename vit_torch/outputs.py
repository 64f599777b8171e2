"""The output classes under Transformers' PyTorch names, as torch pytrees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree

from vit_common.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    ModelOutput,
    Siglip2Output,
    SiglipOutput,
    field_names,
)

__all__ = [
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "CLIPOutput",
    "CLIPTextModelOutput",
    "CLIPVisionModelOutput",
    "DeiTForImageClassificationWithTeacherOutput",
    "ImageClassifierOutput",
    "MaskedImageModelingOutput",
    "MaskedLMOutput",
    "Siglip2Output",
    "SiglipOutput",
]


def _register(output: type[ModelOutput]) -> None:
    # Only what is set: None is a leaf to torch, and `torch.func.vmap` refuses it.
    def build(values: Iterable[Any], names: list[str]) -> ModelOutput:
        given = dict(zip(names, values, strict=True))
        return output.from_fields(given.get(name) for name in field_names(output))

    _pytree.register_pytree_node(
        output,
        lambda value: (list(value.values()), list(value.keys())),
        build,
        serialized_type_name=f"vit_torch.{output.__name__}",
    )


for _class in (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    Siglip2Output,
    SiglipOutput,
):
    _register(_class)
