"""Google's `.npz`: google-research/vision_transformer (also AugReg) and google-research/big_vision;
and the trees that Scenic trains.

Sources: `vit_jax/models_vit.py`, `vit_jax/train.py` and `vit_jax/checkpoint.py` of
google-research/vision_transformer, whose published files have the names of Flax before linen;
`big_vision/models/vit.py` of google-research/big_vision; `scenic/projects/baselines/vit.py` of
google-research/scenic. All were trained with
`flax.linen.gelu`, the tanh approximation, and linen's epsilon of 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError
from vit_common.files.containers.tensor import Tensor
from vit_common.images.processor import ViTImageProcessor
from vit_convert.formats import stems
from vit_convert.formats.format import Files, Format, Implied, Rule
from vit_convert.layouts import HWIO, KEEP, TRANSPOSE, heads_apart

_SETTINGS = {
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "position_resize": "bilinear_align_corners",
}
_POSEMBED = "Transformer/posembed_input/pos_embedding"
_POSITIONS = "pos_embedding"
_HYBRID = (
    (
        r"(norm_root|block\d+/unit\d+/(a|b|c|gn_a|norm\w*))/.*",
        "a ResNet of BiT's names before its patches",
    ),
)
_PARTS = (
    (r"MAPHead_(?!0/)\d+/.*", "a second attention pooling"),
    (r".*/(query|key)(_norm|_ln)/.*", "norms of query and key"),
    (r".*/(Moe|MoeMlp)\w*/.*", "a mixture of experts"),
)
_SCENIC_HEAD = "output_projection"
_BLOCK = "Transformer/encoderblock_{i}/"
_LAYER = "encoder.layer.{i}."


def _rules(
    heads: int, positions: str, norm2: str, attention: str, mlp: str, *, classifier: str
) -> tuple[Rule, ...]:
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
    pooler, pooler_attention = "MAPHead_0/", "MAPHead_0/MultiHeadDotProductAttention_0/"
    norms[f"{pooler}LayerNorm_0"] = "pooler.layernorm"
    for theirs, ours in norms.items():
        rules += [
            Rule(f"{theirs}/scale", f"{ours}.weight"),
            Rule(f"{theirs}/bias", f"{ours}.bias"),
        ]
    dense = {
        f"{pooler}MlpBlock_0/Dense_0": "pooler.intermediate.dense",
        f"{pooler}MlpBlock_0/Dense_1": "pooler.output.dense",
        "pre_logits": "pooler.dense",
        classifier: "classifier",
        f"{_BLOCK}{mlp}/Dense_0": f"{_LAYER}intermediate.dense",
        f"{_BLOCK}{mlp}/Dense_1": f"{_LAYER}output.dense",
    }
    for theirs, ours in dense.items():
        rules += [
            Rule(f"{theirs}/kernel", f"{ours}.weight", TRANSPOSE),
            Rule(f"{theirs}/bias", f"{ours}.bias"),
        ]
    rules.append(Rule(f"{pooler}probe", "pooler.probe"))
    for theirs, ours, out in (
        (f"{_BLOCK}{attention}/", f"{_LAYER}attention.attention", f"{_LAYER}attention.output"),
        (pooler_attention, "pooler.attention", "pooler.attention.output"),
    ):
        for name in ("query", "key", "value"):
            rules += [
                Rule(f"{theirs}{name}/kernel", f"{ours}.{name}.weight", kernel),
                Rule(f"{theirs}{name}/bias", f"{ours}.{name}.bias", bias),
            ]
        rules += [
            Rule(f"{theirs}out/kernel", f"{out}.dense.weight", output),
            Rule(f"{theirs}out/bias", f"{out}.dense.bias", KEEP),
        ]
    return tuple(rules)


_MOST_BLOCKS = 10_000
"""Of a stack: without bytes in them, a file can claim any number."""
_STACK = "Transformer/encoderblock/"


def unstacked(
    tensors: Mapping[str, tuple[str, Tensor]],
) -> tuple[dict[str, tuple[str, Tensor]], None]:
    """The tensors of each block, where big_vision ran the blocks as a scan (`scan=True`) and its
    file has those of all blocks in one array, the block as its first axis.

    Args:
        tensors: name -> (name in the file, tensor).

    Returns:
        The same by block: name, as in a file of separate blocks -> (name in the file, tensor).
        Tensors are read block by block. Everything else is as it was; nothing is to be said of it.

    Raises:
        CheckpointError: the arrays are not of one number of blocks, or blocks are there twice.
    """
    stacks = {name: tensor for name, (_, tensor) in tensors.items() if name.startswith(_STACK)}
    found = {name: entry for name, entry in tensors.items() if name not in stacks}
    if not stacks:
        return found, None
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
            found[name] = (tensors[full][0], tensor.row(i, name))
    return found, None


def _preprocessing(config: ViTConfig) -> Implied:
    height, width = config.image_height_width
    processor = ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return processor, "Google's (x - 127.5) / 127.5"


def _loses(config: ViTConfig, own_config: bool) -> list[str]:
    if config.qkv_bias:
        return []
    return [
        "Google's own code expects biases of query, key and value, which this network does not "
        "have; vit_flax and vit_torch read the file."
    ]


def sines_and_cosines(grid: tuple[int, int], width: int) -> np.ndarray:
    """The fixed positions of big_vision's `posemb="sincos2d"`: sines and cosines of each patch's
    column, then of its row.

    Args:
        grid: (rows, columns) of patches.
        width: D, a multiple of 4.

    Returns:
        (rows * columns, D), float32.

    Source: `posemb_sincos_2d` of `big_vision/models/vit.py`; Beyer et al. 2022, arXiv:2205.01580.
    """
    y, x = (axis.reshape(-1, 1) for axis in np.indices(grid))
    quarter = width // 4
    omega = 1.0 / 10_000.0 ** (np.arange(quarter) / max(quarter - 1, 1))
    parts = (np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _is_big_visions(config: ViTConfig) -> bool:
    """Whether a network is one of big_vision's: patches alone have positions."""
    by_attention = config.pooling == "map" and not config.num_prefix_tokens
    return config.position_tokens == "patches" or by_attention


_OLD = ("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")
_LINEN = ("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")


@lru_cache(maxsize=32)
def _tables(heads: int) -> tuple[Format, ...]:
    """The tables for networks of `heads` heads; reading needs none."""

    def table(
        describes: str,
        place: str,
        names: tuple[str, ...],
        stem: tuple[Rule, ...] = (),
        *,
        name: str = "google",
        classifier: str = "head",
        preprocessing: Any = _preprocessing,
        **more: Any,
    ) -> Format:
        return Format(
            name=name,
            describes=describes,
            files=Files(container="npz", suffix=".npz"),
            rules=_rules(heads, place, *names, classifier=classifier) + stem,
            separator="/",
            settings=_SETTINGS,
            stem={"stem_standardization": "deviation", "stem_norm_eps": 1e-6},
            imagenet=True,
            preprocessing=preprocessing,
            loses=_loses,
            refuses=_HYBRID,
            parts=_PARTS,
            **more,
        )

    return (
        table(
            "google-research vision_transformer or AugReg",
            _POSEMBED,
            _OLD,
            stems.GOOGLE,
            fits=lambda config, head: not _is_big_visions(config),
            for_writing=lambda table, config: _tables(config.num_attention_heads)[0],
        ),
        table(
            "google-research big_vision",
            _POSITIONS,
            _LINEN,
            root="params/",
            requires=(_POSITIONS,),
            fits=lambda config, head: _is_big_visions(config),
            for_writing=lambda table, config: _tables(config.num_attention_heads)[1],
        ),
        table(
            "google-research vision_transformer, as its own training saves it",
            _POSEMBED,
            _LINEN,
            stems.GOOGLE_LINEN,
            requires=(_POSEMBED,),
            written=False,
        ),
        table(
            "google-research big_vision with fixed positions (sincos2d)",
            _POSITIONS,
            _LINEN,
            lacks=(_POSITIONS, _POSEMBED),
            positions=sines_and_cosines,
            image_size=224,  # arXiv:2205.01580, section 3
            written=False,
        ),
        table(
            "google-research scenic",
            _POSEMBED,
            _LINEN,
            name="scenic",
            classifier=_SCENIC_HEAD,
            preprocessing=None,
            requires=(_POSEMBED, f"{_SCENIC_HEAD}/kernel"),
            written=False,
        ),
    )


FORMATS = _tables(1)
