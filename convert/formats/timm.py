"""timm's state dicts of plain Vision Transformers (class token, one head, no pre-logits layer).

Source: `timm/models/vision_transformer.py`, timm 1.0.
"""

from convert.layouts import FUSED_QKV
from convert.rules import Format, Rule

_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

TIMM = Format(
    name="timm",
    describes="timm state dict of a plain Vision Transformer",
    settings={"layer_norm_eps": 1e-6, "position_resize": "bicubic_antialias"},
    rules=tuple(Rule(theirs, ours) for theirs, ours in _TOP.items())
    + tuple(
        Rule(f"blocks.{{i}}.{theirs}.{leaf}", f"encoder.layer.{{i}}.{ours}.{leaf}")
        for theirs, ours in _BLOCK.items()
        for leaf in ("weight", "bias")
    )
    + tuple(
        Rule(
            f"blocks.{{i}}.attn.qkv.{leaf}",
            tuple(
                f"encoder.layer.{{i}}.attention.attention.{name}.{leaf}"
                for name in ("query", "key", "value")
            ),
            FUSED_QKV,
        )
        for leaf in ("weight", "bias")
    ),
)
