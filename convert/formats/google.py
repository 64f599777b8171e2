"""Google's `.npz`: google-research/vision_transformer (also AugReg) and google-research/big_vision.

Sources: `vit_jax/models_vit.py` and `vit_jax/checkpoint.py` of google-research/vision_transformer;
`big_vision/models/vit.py` of google-research/big_vision. Both were trained with
`flax.linen.gelu`, the tanh approximation, and linen's epsilon of 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from vit_common.errors import CheckpointError
from vit_common.files.containers.tensor import Tensor
from vit_convert.layouts import HWIO, KEEP, TRANSPOSE, heads_apart
from vit_convert.rules import Format, Rule

_SETTINGS = {
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "position_resize": "bilinear_align_corners",
}
_BLOCK = "Transformer/encoderblock_{i}/"
_LAYER = "encoder.layer.{i}."


def _rules(heads: int, positions: str, norm2: str, attention: str, mlp: str) -> tuple[Rule, ...]:
    kernel, bias, output = heads_apart(heads)
    rules = [
        Rule("cls", "embeddings.cls_token"),
        Rule(positions, "embeddings.position_embeddings"),
        Rule("embedding/kernel", "embeddings.patch_embeddings.projection.weight", HWIO),
        Rule("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    ]
    norms = {
        "Transformer/encoder_norm": "layernorm",
        f"{_BLOCK}LayerNorm_0": f"{_LAYER}layernorm_before",
        f"{_BLOCK}{norm2}": f"{_LAYER}layernorm_after",
    }
    for theirs, ours in norms.items():
        rules += [
            Rule(f"{theirs}/scale", f"{ours}.weight"),
            Rule(f"{theirs}/bias", f"{ours}.bias"),
        ]
    dense = {
        "pre_logits": "pooler.dense",
        "head": "classifier",
        f"{_BLOCK}{mlp}/Dense_0": f"{_LAYER}intermediate.dense",
        f"{_BLOCK}{mlp}/Dense_1": f"{_LAYER}output.dense",
    }
    for theirs, ours in dense.items():
        rules += [
            Rule(f"{theirs}/kernel", f"{ours}.weight", TRANSPOSE),
            Rule(f"{theirs}/bias", f"{ours}.bias"),
        ]
    for name in ("query", "key", "value"):
        rules += [
            Rule(
                f"{_BLOCK}{attention}/{name}/kernel",
                f"{_LAYER}attention.attention.{name}.weight",
                kernel,
            ),
            Rule(
                f"{_BLOCK}{attention}/{name}/bias",
                f"{_LAYER}attention.attention.{name}.bias",
                bias,
            ),
        ]
    rules += [
        Rule(f"{_BLOCK}{attention}/out/kernel", f"{_LAYER}attention.output.dense.weight", output),
        Rule(f"{_BLOCK}{attention}/out/bias", f"{_LAYER}attention.output.dense.bias", KEEP),
    ]
    return tuple(rules)


_MOST_BLOCKS = 10_000
"""Of a stack: without bytes in them, a file can claim any number."""
_STACK = "Transformer/encoderblock/"


def unstacked(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The tensors of each block, where big_vision ran the blocks as a scan (`scan=True`) and its
    file has those of all blocks in one array, the block as its first axis.

    Returns:
        name, as in a file of separate blocks -> (name in this file, tensor). Tensors are read block
        by block. Everything else is as it was.

    Raises:
        CheckpointError: the arrays are not of one number of blocks, or blocks are there twice.
    """
    stacks = {name: tensor for name, tensor in tensors.items() if name.startswith(_STACK)}
    found = {name: (name, tensor) for name, tensor in tensors.items() if name not in stacks}
    if not stacks:
        return found
    counts = {tensor.shape[0] if tensor.shape else 0 for tensor in stacks.values()}
    if len(counts) > 1 or not 0 < max(counts) <= _MOST_BLOCKS:
        raise CheckpointError(
            f"the arrays under {_STACK!r} must have the blocks as their first axis, as many in "
            f"each; given {', '.join(f'{n} {t.shape}' for n, t in list(stacks.items())[:12])}."
        )
    for i in range(counts.pop()):
        for full, tensor in stacks.items():
            name = f"Transformer/encoderblock_{i}/{full.removeprefix(_STACK)}"
            if name in found:
                raise CheckpointError(f"{name!r} is also in the stack {full!r}.")
            found[name] = (full, tensor.row(i, name))
    return found


@lru_cache(maxsize=32)
def formats(heads: int) -> tuple[Format, Format]:
    """The tables of vision_transformer and of big_vision for networks of `heads` heads."""
    return (
        Format(
            name="google",
            describes="google-research vision_transformer or AugReg",
            rules=_rules(
                heads,
                "Transformer/posembed_input/pos_embedding",
                "LayerNorm_2",
                "MultiHeadDotProductAttention_1",
                "MlpBlock_3",
            ),
            separator="/",
            settings=_SETTINGS,
        ),
        Format(
            name="google",
            describes="google-research big_vision",
            rules=_rules(
                heads,
                "pos_embedding",
                "LayerNorm_1",
                "MultiHeadDotProductAttention_0",
                "MlpBlock_0",
            ),
            separator="/",
            root="params/",
            settings=_SETTINGS,
        ),
    )


FORMATS = formats(1)
