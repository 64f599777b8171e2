"""Hub files in PyTorch's layouts: the names Transformers v4 writes (canonical) and those of v5.

Sources: `models/vit/modeling_vit.py` of Transformers 4.57.6 and of 5.x.
"""

from convert.rules import Format, Rule

_EMBEDDINGS = (
    "embeddings.cls_token",
    "embeddings.mask_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
)
_TOP = (
    "layernorm.weight",
    "layernorm.bias",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "classifier.weight",
    "classifier.bias",
    "decoder.0.weight",
    "decoder.0.bias",
)
# canonical part of a block <-> its v5 name
_BLOCK = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}

_SAME = tuple(Rule(name, name) for name in (*_EMBEDDINGS, *_TOP))

HUB = Format(
    name="hub",
    describes="Hub torch layout, names of Transformers v4",
    prefix="vit.",
    rules=_SAME
    + tuple(
        Rule(f"encoder.layer.{{i}}.{part}.{leaf}", f"encoder.layer.{{i}}.{part}.{leaf}")
        for part in _BLOCK
        for leaf in ("weight", "bias")
    ),
)

HUB_V5 = Format(
    name="hub-v5",
    describes="Hub torch layout, names of Transformers v5",
    prefix="vit.",
    rules=_SAME
    + tuple(
        Rule(f"layers.{{i}}.{new}.{leaf}", f"encoder.layer.{{i}}.{old}.{leaf}")
        for old, new in _BLOCK.items()
        for leaf in ("weight", "bias")
    ),
)
