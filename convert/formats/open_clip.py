"""OpenAI's CLIP and open_clip: `visual.*` for the image tower, the text tower beside it.

Sources: `clip/model.py` of github.com/openai/CLIP; `src/open_clip/model.py` and `transformer.py` of
github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_common.config import ViTConfig
from vit_common.images.processors import CLIPImageProcessor
from vit_convert.formats.format import Files, Format, Implied, Rule
from vit_convert.formats.huggingface import CLIP
from vit_convert.layouts import FUSED_QKV, TOKEN, TRANSPOSE, VECTOR

_BLOCK = {
    "attn.out_proj": "attention.output.dense",
    "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense",
    "ln_1": "layernorm_before",
    "ln_2": "layernorm_after",
}
_TEXT = "text_model."
# OpenAI's own files hold these numbers beside the weights; its code derives sizes from the rest.
_CONSTANTS = ("input_resolution", "context_length", "vocab_size")


def _rules() -> tuple[Rule, ...]:
    rules = [
        Rule("visual.class_embedding", "embeddings.cls_token", VECTOR),
        Rule("visual.positional_embedding", "embeddings.position_embeddings", TOKEN),
        Rule("visual.conv1.weight", "embeddings.patch_embeddings.projection.weight"),
        Rule("visual.proj", "visual_projection.weight", TRANSPOSE),
        Rule("token_embedding.weight", f"{_TEXT}embeddings.token_embedding.weight"),
        Rule("positional_embedding", f"{_TEXT}embeddings.position_embedding.weight"),
        Rule("text_projection", "text_projection.weight", TRANSPOSE),
        Rule("logit_scale", "logit_scale"),
    ]
    for leaf in ("weight", "bias"):
        rules += [
            Rule(f"visual.ln_pre.{leaf}", f"pre_layernorm.{leaf}"),
            Rule(f"visual.ln_post.{leaf}", f"pooler.layernorm.{leaf}"),
            Rule(f"ln_final.{leaf}", f"{_TEXT}final_layernorm.{leaf}"),
        ]
        for start, ours in (("visual.", ""), ("", _TEXT)):
            block = f"{start}transformer.resblocks.{{i}}"
            layer = f"{ours}encoder.layer.{{i}}"
            parts = tuple(
                f"{layer}.attention.attention.{name}.{leaf}" for name in ("query", "key", "value")
            )
            rules.append(Rule(f"{block}.attn.in_proj_{leaf}", parts, FUSED_QKV))
            rules += [
                Rule(f"{block}.{theirs}.{leaf}", f"{layer}.{name}.{leaf}")
                for theirs, name in _BLOCK.items()
            ]
    return tuple(rules)


def _says(source: Mapping[str, Any]) -> dict[str, Any]:
    """What the files say that the shapes of the network do not."""
    said: dict[str, Any] = {}
    if "visual.proj" in source:
        said["projection_dim"] = source["visual.proj"].shape[1]
    if set(_CONSTANTS) <= set(source):  # OpenAI's: heads are 64 wide, the activation is one
        said["hidden_act"] = "quick_gelu"
        said["num_attention_heads"] = max(source["visual.conv1.weight"].shape[0] // 64, 1)
    return said


def _preprocessing(config: ViTConfig) -> Implied | None:
    height, width = config.image_height_width
    if height != width:
        return None
    processor = CLIPImageProcessor(
        size={"shortest_edge": height}, crop_size={"height": height, "width": width}
    )
    return processor, "the published code of CLIP and open_clip"


FORMATS = (
    Format(
        name="open_clip",
        describes="OpenAI's CLIP or open_clip",
        families=CLIP,
        files=Files(),
        rules=_rules(),
        respelled=((r"^text\.(?=token_embedding|positional|transformer|ln_final|text_proj)", ""),),
        requires=("visual.class_embedding", "visual.ln_pre.weight"),
        ignored=(
            ("|".join(_CONSTANTS), "a number of the network, no weight"),
            (r"(text\.)?attn_mask", "a mask computed from the number of tokens, no weight"),
        ),
        refuses=((r"visual\.layer\d\.\d+\.conv\d\.weight", "CLIP's image tower of convolutions"),),
        settings={"layer_norm_eps": 1e-5},
        says=_says,
        unsaid=lambda shapes: ("hidden_act",),
        preprocessing=_preprocessing,
    ),
)
