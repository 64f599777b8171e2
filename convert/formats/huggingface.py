"""Hub files in PyTorch's layouts: the names Transformers v4 writes and those of v5.

The canonical names are those of v4's ViT, DeiT and BEiT; DINOv2's blocks differ.

Sources: `models/{vit,deit,beit,dinov2,dinov2_with_registers,dinov3_vit,vit_mae,clip,siglip,
siglip2}/modeling_*.py` of Transformers 4.57.6 and 5.23.
"""

from collections.abc import Iterator

from vit_common.config import ViTConfig
from vit_common.parameters import DIFFERENTIAL
from vit_convert.formats.format import Files, Format, Rule
from vit_convert.formats.stems import TRANSFORMERS
from vit_convert.layouts import FUSED_QKV, GATE_AND_UP, KEEP, PATCHES, TOKEN, VECTOR, Layout

ATTENTION_POOLER_DENSE = (
    "pooler.attention.query",
    "pooler.attention.key",
    "pooler.attention.value",
    "pooler.attention.output.dense",
    "pooler.intermediate.dense",
    "pooler.output.dense",
)
ATTENTION_POOLER = (
    "pooler.probe",
    *(f"{name}.{leaf}" for name in ATTENTION_POOLER_DENSE for leaf in ("weight", "bias")),
)
_TOP = (
    "embeddings.cls_token",
    "embeddings.distillation_token",
    "embeddings.register_tokens",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
    "encoder.rope_frequencies",
    "pre_layernorm.weight",
    "pre_layernorm.bias",
    "layernorm.weight",
    "layernorm.bias",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "pooler.layernorm.weight",
    "pooler.layernorm.bias",
    *ATTENTION_POOLER,
    "classifier.weight",
    "classifier.bias",
    "cls_classifier.weight",
    "cls_classifier.bias",
    "distillation_classifier.weight",
    "distillation_classifier.bias",
    "decoder.0.weight",
    "decoder.0.bias",
    "lm_layernorm.weight",
    "lm_layernorm.bias",
    "lm_head.weight",
    "lm_head.bias",
)
_TABLE = "relative_position_bias.relative_position_bias_table"

# canonical module or parameter of a block <-> its name in v5
BLOCK = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    f"attention.attention.{_TABLE}": _TABLE,
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "lambda_1": "lambda_1",
    "lambda_2": "lambda_2",
}
RELATIVE_MLP = tuple(
    f"relative_position_bias.{name}" for name in ("in_kernel", "in_bias", "out_kernel", "out_bias")
)
"""What relative positions by an MLP have, in a block or beside all of them."""

# what blocks of ViT's extensions have beside these, under the canonical names everywhere
EXTENDED_BLOCK = (
    "attention.attention.query_norm",
    "attention.attention.key_norm",
    "attention.output.layernorm",
    "intermediate.layernorm",
    "output.layernorm",
    *(f"attention.attention.{name}" for name in RELATIVE_MLP),
    *(f"attention.attention.differential.{name}" for name in (*DIFFERENTIAL, "norm")),
)
# canonical <-> DINOv2
DINOV2_BLOCK = {
    "attention.attention.query": "attention.attention.query",
    "attention.attention.key": "attention.attention.key",
    "attention.attention.value": "attention.attention.value",
    "attention.output.dense": "attention.output.dense",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "layer_scale1.lambda1",
    "lambda_2": "layer_scale2.lambda1",
}
DINOV2_SWIGLU_BLOCK = {
    **DINOV2_BLOCK,
    "intermediate.dense": "mlp.weights_in",
    "output.dense": "mlp.weights_out",
}


def stem_modules() -> tuple[str, ...]:
    """Modules of the network before the patches; `{i}` is the number of a block in its stage."""
    outside = ("convolution", "norm", "convolution2", "convolution3", "norm_out")
    return tuple(f"embeddings.stem.{module}" for module in outside) + tuple(
        f"embeddings.stem.stage{stage}.{{i}}.{module}"
        for stage in range(4)
        for module in (
            *(f"{kind}{which}" for kind in ("conv", "norm") for which in (*"123", "_shortcut")),
            "norm",
        )
    )


STEM = stem_modules()
_LEAVES = ("weight", "bias")

CLIP = ("clip_vision_model", "clip_text_model", "clip")
SIGLIP = ("siglip_vision_model", "siglip_text_model", "siglip")
SIGLIP2 = ("siglip2_vision_model", "siglip2_text_model", "siglip2")
# canonical <-> CLIP and SigLIP
CLIP_BLOCK = {
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
}
CLIP_TOP = {
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "pre_layrnorm": "pre_layernorm",  # spelt so in Transformers' files
    "post_layernorm": "pooler.layernorm",
    "visual_projection": "visual_projection",
    "text_projection": "text_projection",
    "classifier": "classifier",
}
"""CLIP's name -> canonical name, of the modules outside the blocks."""

SIGLIP_TOP = {
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "post_layernorm": "layernorm",
    "head.attention.out_proj": "pooler.attention.output.dense",
    "head.layernorm": "pooler.layernorm",
    "head.mlp.fc1": "pooler.intermediate.dense",
    "head.mlp.fc2": "pooler.output.dense",
    "classifier": "classifier",
}
"""SigLIP's name -> canonical name, of the modules outside the blocks."""

DINOV3_BLOCK = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "layer_scale1.lambda1",
    "lambda_2": "layer_scale2.lambda1",
}

BEIT_HEAD = (("layernorm.", "lm_layernorm."),)
"""BEiT's head for masked image modelling calls its norm as the network under it calls its own."""

# jimm (flax.nnx), whose files are the Hub's, writes the numbers of the tokens too.
_JIMM = (r"(encoder\.)?vision_position_ids", "an index, no weight")
_NO_WEIGHTS = (
    _JIMM,
    (r".*relative_position_index", "an index computed from the grid, no weight"),
    (r"embeddings\.position_ids", "an index, no weight"),
)
_INDICES = ((r"(text_model\.)?embeddings\.position_ids", "an index, no weight"), _JIMM)


def _leaves(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{leaf}" for leaf in _LEAVES)


def _block(
    table: dict[str, str], start: str, branch: str = "", but: tuple[str, ...] = ()
) -> tuple[Rule, ...]:
    """The rules of a block's parameters, or of those of a branch beside its first."""
    rules = []
    for ours, theirs in table.items():
        alone = ours.endswith(("lambda_1", "lambda_2", "_table", *RELATIVE_MLP, *DIFFERENTIAL))
        for leaf in ("",) if alone else (".weight", ".bias"):
            if ours not in but:
                name = f"encoder.layer.{{i}}.{branch}{ours}{leaf}"
                rules.append(Rule(f"{start}{branch}{theirs}{leaf}", name))
    return tuple(rules)


def _top(mask_token: Layout = KEEP, shared: str = f"encoder.{_TABLE}") -> tuple[Rule, ...]:
    return (
        *(Rule(name, name) for name in _TOP),
        *(Rule(f"encoder.{name}", f"encoder.{name}") for name in RELATIVE_MLP),
        *(Rule(name, name) for module in STEM for name in _leaves(module)),
        Rule("embeddings.mask_token", "embeddings.mask_token", mask_token),
        Rule(shared, f"encoder.{_TABLE}"),
    )


_TEXT = "text_model."


def _tower_blocks(start: str, ours: str) -> list[Rule]:
    """The blocks of a tower, whose names begin with `start`, and the canonical ones with `ours`."""
    return [
        Rule(
            f"{start}encoder.layers.{{i}}.{theirs}.{leaf}",
            f"{ours}encoder.layer.{{i}}.{canonical}.{leaf}",
        )
        for canonical, theirs in CLIP_BLOCK.items()
        for leaf in _LEAVES
    ]


def _text_tower(start: str = _TEXT) -> list[Rule]:
    """A text tower, whose names begin with `start`."""
    rules = _tower_blocks(start, _TEXT)
    for name in ("token_embedding", "position_embedding"):
        name = f"embeddings.{name}.weight"
        rules.append(Rule(f"{start}{name}", f"{_TEXT}{name}"))
    for leaf in _LEAVES:
        rules.append(Rule(f"{start}final_layer_norm.{leaf}", f"{_TEXT}final_layernorm.{leaf}"))
    return rules


def _text_head(start: str = _TEXT) -> list[Rule]:
    """SigLIP's projection of a text."""
    return [Rule(f"{start}head.{leaf}", f"{_TEXT}head.{leaf}") for leaf in _LEAVES]


def _both_towers(top: dict[str, str]) -> list[Rule]:
    """Both towers; the image's names are prefixed in files."""
    place = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
    rules = [Rule(*place, TOKEN), Rule("logit_scale", "logit_scale")]
    for theirs, ours in top.items():
        rules += [Rule(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in _LEAVES]
    return [*rules, *_tower_blocks("", ""), *_text_tower()]


def _clip() -> tuple[Rule, ...]:
    token = Rule("embeddings.class_embedding", "embeddings.cls_token", VECTOR)
    return (token, *_both_towers(CLIP_TOP))


def _siglip(patches: Layout = KEEP) -> tuple[Rule, ...]:
    """Both towers of SigLIP; query, key and value of the pooling are in one array."""
    projection = "embeddings.patch_embeddings.projection.weight"
    fused = [
        Rule(
            f"head.attention.in_proj_{leaf}",
            tuple(f"pooler.attention.{name}.{leaf}" for name in ("query", "key", "value")),
            FUSED_QKV,
        )
        for leaf in _LEAVES
    ]
    return (
        Rule("embeddings.patch_embedding.weight", projection, patches),
        *fused,
        Rule("head.probe", "pooler.probe"),
        Rule("logit_bias", "logit_bias"),
        *_both_towers(SIGLIP_TOP),
        *_text_head(),
    )


def _dinov3(start: str, gated: bool) -> tuple[Rule, ...]:
    """DINOv3; the blocks' names begin with `start`."""
    tokens = ("cls_token", "mask_token", "register_tokens")
    rules = [Rule(f"embeddings.{name}", f"embeddings.{name}") for name in tokens]
    names = {
        "embeddings.patch_embeddings": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "classifier": "classifier",
    }
    for leaf in ("weight", "bias"):
        rules += [Rule(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in names.items()]
        if gated:
            rules.append(
                Rule(
                    (f"{start}mlp.gate_proj.{leaf}", f"{start}mlp.up_proj.{leaf}"),
                    f"{_V4}intermediate.dense.{leaf}",
                    GATE_AND_UP,
                )
            )
    return (*rules, *_block(DINOV3_BLOCK, start, but=("intermediate.dense",) if gated else ()))


_V4 = "encoder.layer.{i}."
_V5 = "layers.{i}."
_SAME = {name: name for name in BLOCK}
_EXTENDED = {**_SAME, **{name: name for name in EXTENDED_BLOCK}}
_V5_DINOV2 = {**DINOV2_BLOCK, **{name: BLOCK[name] for name in list(BLOCK)[:3]}}
_V5_DINOV2["attention.output.dense"] = "attention.o_proj"
_V5_SWIGLU = tuple(
    rule
    for leaf in ("weight", "bias")
    for rule in (
        Rule(
            (f"{_V4}mlp.gate_proj.{leaf}", f"{_V4}mlp.up_proj.{leaf}"),
            f"{_V4}intermediate.dense.{leaf}",
            GATE_AND_UP,
        ),
        Rule(f"{_V4}mlp.down_proj.{leaf}", f"{_V4}output.dense.{leaf}"),
    )
)
_BRANCH = "branch.{j}."
V4_NAMES = "Hub torch layout, names of Transformers v4"
V5_NAMES = "Hub torch layout, names of Transformers v5"
_VIT, _BEIT, _DINOV2 = ("vit", "deit"), ("beit",), ("dinov2", "dinov2_with_registers")


def extended(config: ViTConfig, own_config: bool = False) -> Iterator[str]:
    """What Transformers does not load, whichever of its layouts it is in."""
    if config.is_extended:
        yield (
            "Transformers has no class for this network; the configuration says model_type "
            f"{config.extended_type!r}, so that it refuses it instead of computing something else. "
            "vit_flax and vit_torch load it."
        )


def _loses(config: ViTConfig, own_config: bool) -> Iterator[str]:
    yield from extended(config)
    row = type(config).fields.get("position_resize")  # a whole CLIP has its image tower's
    rule = "bicubic" if row is None else row.default
    if not config.is_extended and config.position_resize != rule:
        yield (
            "Transformers does not know `position_resize` and resamples positions to other image "
            f"sizes by its own rule, not by {config.position_resize!r}; at the native size nothing "
            "differs."
        )


FILES = Files(container="safetensors", tag="pt", suffix=".safetensors", described=True)


def gated(config: ViTConfig, head: object) -> bool:
    """Whether the MLP is a SwiGLU, whose names differ in DINOv2."""
    return config.use_swiglu_ffn


def plain(config: ViTConfig, head: object) -> bool:
    """Whether it is not."""
    return not config.use_swiglu_ffn


def _format(families, rules, describes, written=True, **more) -> Format:
    return Format(
        name="hub",
        files=FILES,
        loses=_loses,
        describes=describes,
        families=families,
        rules=rules,
        prefixed=True,
        written=written,
        **{"ignored": _NO_WEIGHTS, **more},
    )


FORMATS = (
    _format(_VIT, _top() + _block(_EXTENDED, _V4) + _block(_EXTENDED, _V4, _BRANCH), V4_NAMES),
    _format(_BEIT, _top() + _block(_SAME, _V4), V4_NAMES, only_with_prefix=BEIT_HEAD),
    _format(_DINOV2, _top(TOKEN) + _block(DINOV2_BLOCK, _V4), V4_NAMES, fits=plain),
    _format(_DINOV2, _top(TOKEN) + _block(DINOV2_SWIGLU_BLOCK, _V4), V4_NAMES, fits=gated),
    _format(("dinov3_vit",), _dinov3("layer.{i}.", False), V4_NAMES, fits=plain),
    _format(("dinov3_vit",), _dinov3("layer.{i}.", True), V4_NAMES, fits=gated),
    _format(
        CLIP,
        _clip(),
        "Hub torch layout of CLIP",
        ignored=_INDICES,
        lacks=("embeddings.patch_embedding.bias",),  # SigLIP's
    ),
    *(
        _format(
            families,
            _siglip(patches),
            f"Hub torch layout of {name}",
            ignored=_INDICES,
            lacks=("embeddings.class_embedding",),  # CLIP's
        )
        for families, patches, name in (
            (SIGLIP, KEEP, "SigLIP"),
            (SIGLIP2, PATCHES, "SigLIP 2 of any size"),
        )
    ),
    _format(
        tuple(f"{name}_text_model" for name in ("clip", "siglip", "siglip2")),
        (*_text_tower(""), *_text_head("")),
        "Hub torch layout of a text tower, names of Transformers v5",
        False,
        requires=("embeddings.token_embedding.weight",),
    ),
    _format(_VIT, _top() + _block(BLOCK, _V5), V5_NAMES, False),
    _format(
        ("vit",),
        TRANSFORMERS + _top() + _block(_SAME, _V4),
        "Hub ViTHybrid, names of Transformers v4",
        False,
        requires=("embeddings.patch_embeddings.backbone.bit.embedder.convolution.weight",),
    ),
    _format(
        _BEIT,
        _top(shared="shared_position_bias.relative_position_bias_table") + _block(BLOCK, _V5),
        V5_NAMES,
        False,
        only_with_prefix=BEIT_HEAD,
    ),
    _format(_DINOV2, _top(TOKEN) + _block(_V5_DINOV2, _V4), V5_NAMES, False),
    _format(
        _DINOV2,
        _top(TOKEN)
        + _block(_V5_DINOV2, _V4, but=("intermediate.dense", "output.dense"))
        + _V5_SWIGLU,
        V5_NAMES,
        False,
    ),
    *(
        _format(("dinov3_vit",), _dinov3("model.layer.{i}.", gate), V5_NAMES, False)
        for gate in (False, True)
    ),
    *(
        _format(
            ("vit",),
            _top() + block,
            f"Hub vit_mae encoder, names of Transformers {version}",
            False,
            ignored=(
                *_NO_WEIGHTS,
                (r"decoder\..*", "the decoder of masked autoencoding, not part of the encoder"),
            ),
        )
        for version, block in (("v4", _block(_SAME, _V4)), ("v5", _block(BLOCK, _V5)))
    ),
)
