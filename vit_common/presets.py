"""Named model sizes, one row per model.

Sources: tiny and small are DeiT-Ti and DeiT-S (Touvron et al. 2021, arXiv:2012.12877, table 1);
base, large and huge are ViT-B, ViT-L and ViT-H (Dosovitskiy et al. 2021, arXiv:2010.11929,
table 1); giant is ViT-g (Zhai et al. 2022, arXiv:2106.04560, table 2). DINOv3's are those of
`dinov3/hub/backbones.py` of facebookresearch/dinov3 (Simeoni et al. 2025, arXiv:2508.10104).
SigLIP's are the image towers of SigLIP (Zhai et al. 2023, arXiv:2303.15343; `configs/proj/
image_text/README_siglip2.md` of google-research/big_vision for SigLIP 2, which adds the giant one).
CLIP's are both towers of OpenAI's models (Radford et al. 2021, arXiv:2103.00020, table 20), and for
the huge one LAION's of open_clip (`model_configs/ViT-H-14.json`). Hybrids are those of Dosovitskiy
et al. and of AugReg (Steiner et al. 2021, arXiv:2106.10270, table 2); EVA-02 is Fang et al. 2023,
arXiv:2303.11331, table 4; the Perception Encoder is Bolya et al. 2025, arXiv:2504.13181, table 6;
the network of parallel blocks is Touvron et al. 2022, arXiv:2203.09795, table 2. What these compute
beside their sizes is that of timm 1.0.31, `eva.py`, `vision_transformer.py` and
`vision_transformer_hybrid.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, shown
from vit_common.families import CLIPConfig, DINOv3ViTConfig, SiglipVisionConfig

#      name       width  depth  heads  MLP width  patch side
PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (192, 12, 3, 768, 16),
    "small": (384, 12, 6, 1536, 16),
    "base": (768, 12, 12, 3072, 16),
    "large": (1024, 24, 16, 4096, 16),
    "huge": (1280, 32, 16, 5120, 14),
    "giant": (1408, 40, 16, 6144, 14),
}


#                    width  depth  heads  MLP width  gated
_DINOV3: dict[str, tuple[int, int, int, int, bool]] = {
    "dinov3-small": (384, 12, 6, 1536, False),
    "dinov3-small-plus": (384, 12, 6, 1536, True),
    "dinov3-base": (768, 12, 12, 3072, False),
    "dinov3-large": (1024, 24, 16, 4096, False),
    "dinov3-huge-plus": (1280, 32, 20, 5120, True),
    "dinov3-7b": (4096, 40, 32, 8192, True),
}


#                    width  depth  heads  MLP width  patch side  image side
_SIGLIP: dict[str, tuple[int, int, int, int, int, int]] = {
    "siglip-base": (768, 12, 12, 3072, 16, 224),
    "siglip-large": (1024, 24, 16, 4096, 16, 256),
    "siglip-so400m": (1152, 27, 16, 4304, 14, 224),
    "siglip2-giant": (1536, 40, 16, 6144, 16, 256),
}


#       image tower: width, depth, heads, patch side, image side; text tower: width, depth
_CLIP: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "clip-base-32": (768, 12, 12, 32, 224, 512, 12),
    "clip-base-16": (768, 12, 12, 16, 224, 512, 12),
    "clip-large-14": (1024, 24, 16, 14, 224, 768, 12),
    "clip-large-14-336": (1024, 24, 16, 14, 336, 768, 12),
    "clip-huge-14": (1280, 32, 16, 14, 224, 1024, 24),
}


def _clip(name: str) -> dict[str, Any]:
    width, depth, heads, patch, image, texts, text_depth = _CLIP[name]
    act = "gelu" if name == "clip-huge-14" else "quick_gelu"
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": patch,
        "image_size": image,
    }
    text = {
        "hidden_size": texts,
        "num_hidden_layers": text_depth,
        "num_attention_heads": texts // 64,
        "intermediate_size": 4 * texts,
    }
    towers = {"vision_config": vision, "text_config": text}
    common = {"projection_dim": texts, "hidden_act": act}
    return {
        "projection_dim": texts,
        **{key: {**tower, **common} for key, tower in towers.items()},
    }


#                  width  depth  heads  MLP width
_EVA02: dict[str, tuple[int, int, int, int]] = {
    "eva02-tiny": (192, 12, 3, 512),
    "eva02-small": (384, 12, 6, 1024),
    "eva02-base": (768, 12, 12, 2048),
    "eva02-large": (1024, 24, 16, 2730),
}


def _eva02(name: str) -> dict[str, Any]:
    return {
        **_sizes(*_EVA02[name], 14),
        "layer_norm_eps": 1e-6,
        "rope_type": "axial",
        "rope_grid_size": 16,
        "use_swiglu_ffn": True,
        "use_mlp_norm": name in ("eva02-base", "eva02-large"),
        "use_key_bias": False,
        "pooling": "mean",
        "norm_after_pooling": True,
        "position_resize": "bicubic_antialias",
    }


#                   as a preset, patch side, image side
_PE: dict[str, tuple[str, int, int]] = {
    "pe-core-base": ("base", 16, 224),
    "pe-core-large": ("large", 14, 336),
}


def _pe(name: str) -> dict[str, Any]:
    size, patch, image = _PE[name]
    return {
        **_sizes(*PRESETS[size]),
        "patch_size": patch,
        "image_size": image,
        "layer_norm_eps": 1e-5,
        "rope_type": "axial",
        "rope_grid_size": image // patch,
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "pooling": "map",
        "pooler_num_heads": 8,
        "pool_prefix_tokens": True,
        "use_patch_bias": False,
        "use_pre_norm": True,
        "num_labels": 1024,  # the width in which images and texts are compared
        "position_resize": "bicubic_antialias",
    }


#                    as a preset, depths of the ResNet's stages, patch side in pixels of the image
_HYBRIDS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "r-tiny-32": ("tiny", (), 32),
    "r26-small-32": ("small", (2, 2, 2, 2), 32),
    "r50-base-16": ("base", (3, 4, 9), 16),
    "r50-large-32": ("large", (3, 4, 6, 3), 32),
}


def _hybrid(name: str) -> dict[str, Any]:
    size, depths, patch = _HYBRIDS[name]
    return {
        **_sizes(*PRESETS[size]),
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "stem_type": "resnetv2",
        "stem_depths": depths,
    }


def _parallel(name: str) -> dict[str, Any]:
    return {
        **_sizes(*PRESETS["small"]),
        "num_hidden_layers": 18,
        "num_parallel_branches": 2,
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 1e-5,
    }


def _siglip(name: str) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip((*names, "patch_size", "image_size"), _SIGLIP[name], strict=True))


def _dinov3(name: str) -> dict[str, Any]:
    width, depth, heads, inner, gated = _DINOV3[name]
    biased = name != "dinov3-7b"
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "num_register_tokens": 4,
        "query_bias": biased,
        "value_bias": biased,
    }


def _sizes(width: int, depth: int, heads: int, inner: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "patch_size": patch,
    }


# Names -> the class of their configuration, and what makes its fields.
_KINDS: tuple[tuple[Iterable[str], type[ViTConfig], Callable[[str], dict[str, Any]]], ...] = (
    (PRESETS, ViTConfig, lambda name: _sizes(*PRESETS[name])),
    (_DINOV3, DINOv3ViTConfig, _dinov3),
    (_SIGLIP, SiglipVisionConfig, _siglip),
    (_CLIP, CLIPConfig, _clip),
    (_EVA02, ViTConfig, _eva02),
    (_PE, ViTConfig, _pe),
    (_HYBRIDS, ViTConfig, _hybrid),
    (("parallel-small-18x2",), ViTConfig, _parallel),
)
NAMES = tuple(name for names, *_ in _KINDS for name in names)
"""Every preset's name."""


def preset(name: str, **overrides: Any) -> ViTConfig:
    """The configuration of a named size; `overrides` are fields of its class, `ViTConfig` or that
    of the family in the name.

    Raises:
        ConfigError: no such name.

    Example:
        >>> preset("clip-base-32").text_config.hidden_size
        512
    """
    for names, cls, fields in _KINDS:
        if name in names:
            return cls(**{**fields(name), **overrides})
    raise ConfigError(f"preset: `name` must be one of {', '.join(NAMES)}; given {shown(name)}.")
