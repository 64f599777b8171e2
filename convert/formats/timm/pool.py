"""The names of timm's attention pooling, which several of its classes have.

Source: `timm/layers/attention_pool.py` of timm 1.0.31.
"""

from __future__ import annotations

from vit_convert.formats.format import Rule
from vit_convert.layouts import FUSED_KV

_MODULES = {
    "q": "attention.query",
    "proj": "attention.output.dense",
    "norm": "layernorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

ATTENTION_POOL = (
    Rule("attn_pool.latent", "pooler.probe"),
    *(
        Rule(f"attn_pool.{theirs}.{leaf}", f"pooler.{ours}.{leaf}")
        for theirs, ours in _MODULES.items()
        for leaf in ("weight", "bias")
    ),
    *(
        Rule(
            f"attn_pool.kv.{leaf}",
            (f"pooler.attention.key.{leaf}", f"pooler.attention.value.{leaf}"),
            FUSED_KV,
        )
        for leaf in ("weight", "bias")
    ),
)
