"""keras-hub's Vision Transformers, as `save_weights` and presets write them (`.weights.h5`).

An array is named by the path of its layer and its number in it. The first block has no number.

Source: `keras_hub/src/models/vit/` of keras-hub 0.32, and `saving/saving_lib.py` of Keras 3.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_common.files.containers.tensor import Tensor
from vit_convert.formats.format import Files, Format, Rule
from vit_convert.layouts import HWIO, KEEP, TOKEN, TRANSPOSE, Layout, heads_apart

_FIRST = "layers/vi_t_encoder/encoder_layers/vi_t_encoder_block"
_BLOCK = f"{_FIRST}_{{i}}/"
_LAYER = "encoder.layer.{i}."
_HEAD, _LAST = "layers/dense/vars/", "layers/dense_1/vars/"


def numbered(
    tensors: Mapping[str, tuple[str, Tensor]],
) -> tuple[dict[str, tuple[str, Tensor]], None]:
    """The tensors with a number in the first block's names, and with the classifier under one name,
    whether a layer is before it or not.

    Args:
        tensors: name -> (name in the file, tensor).

    Returns:
        The same by the names of the table; nothing is to be said of it.
    """
    found = {name.replace(f"{_FIRST}/", f"{_FIRST}_0/"): entry for name, entry in tensors.items()}
    if f"{_LAST}0" in found and f"{_HEAD}0" in found:
        before = {n: found.pop(n) for n in [*found] if n.startswith(_HEAD)}
        last = {n: found.pop(n) for n in [*found] if n.startswith(_LAST)}
        found |= {n.replace(_HEAD, "pre_logits/vars/"): entry for n, entry in before.items()}
        found |= {n.replace(_LAST, _HEAD): entry for n, entry in last.items()}
    return found, None


def _pair(theirs: str, ours: str, weight: Layout, bias: Layout = KEEP) -> list[Rule]:
    """A layer's two arrays."""
    return [
        Rule(f"{theirs}/vars/0", f"{ours}.weight", weight),
        Rule(f"{theirs}/vars/1", f"{ours}.bias", bias),
    ]


def _rules() -> tuple[Rule, ...]:
    kernel, bias, output = heads_apart(1)  # reading finds the number of heads in the arrays
    embedding = "layers/vi_t_patching_and_embedding"
    projection = "embeddings.patch_embeddings.projection"
    rules = [
        Rule(f"{embedding}/vars/0", "embeddings.cls_token"),
        Rule(f"{embedding}/position_embedding/vars/0", "embeddings.position_embeddings", TOKEN),
        *_pair(f"{embedding}/patch_embedding", projection, HWIO),
        *_pair("layers/vi_t_encoder/layer_norm", "layernorm", KEEP),
        *_pair("pre_logits", "pooler.dense", TRANSPOSE),
        *_pair("layers/dense", "classifier", TRANSPOSE),
        *_pair(f"{_BLOCK}layer_norm_1", f"{_LAYER}layernorm_before", KEEP),
        *_pair(f"{_BLOCK}layer_norm_2", f"{_LAYER}layernorm_after", KEEP),
        *_pair(f"{_BLOCK}mha/output_dense", f"{_LAYER}attention.output.dense", output),
        *_pair(f"{_BLOCK}mlp/dense_1", f"{_LAYER}intermediate.dense", TRANSPOSE),
        *_pair(f"{_BLOCK}mlp/dense_2", f"{_LAYER}output.dense", TRANSPOSE),
    ]
    for name in ("query", "key", "value"):
        ours = f"{_LAYER}attention.attention.{name}"
        rules += _pair(f"{_BLOCK}mha/{name}_dense", ours, kernel, bias)
    return tuple(rules)


def is_keras(table: Mapping[str, Any] | None) -> bool:
    """Whether a `config.json` is Keras's own, beside the weights of a preset."""
    return table is not None and {"module", "class_name", "registered_name"} <= table.keys()


FORMATS = (
    Format(
        name="keras-hub",
        describes="keras-hub Vision Transformer",
        files=Files(container="hdf5", suffix=".h5"),
        rules=_rules(),
        separator="/",
        unsaid=lambda shapes: ("layer_norm_eps",),  # 1e-6, or as in the weights it was made from
        ignored=((r"optimizer/.*", "state of the optimizer"),),
        imagenet=True,
        written=False,
    ),
)
