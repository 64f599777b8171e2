"""The output classes under Transformers' PyTorch names, as torch pytrees."""

from __future__ import annotations

from torch.utils import _pytree

from vit_common.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    ModelOutput,
    field_names,
)

__all__ = [
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "DeiTForImageClassificationWithTeacherOutput",
    "ImageClassifierOutput",
    "MaskedImageModelingOutput",
    "MaskedLMOutput",
]


def _register(output: type[ModelOutput]) -> None:
    names = field_names(output)
    _pytree.register_pytree_node(
        output,
        lambda value: ([getattr(value, name) for name in names], None),
        lambda values, _: output.from_fields(values),
        serialized_type_name=f"vit_torch.{output.__name__}",
    )


for _class in (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
):
    _register(_class)
