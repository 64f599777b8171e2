"""Named model sizes, one row per model.

Sources: tiny and small are DeiT-Ti and DeiT-S (Touvron et al. 2021, arXiv:2012.12877, table 1);
base, large and huge are ViT-B, ViT-L and ViT-H (Dosovitskiy et al. 2021, arXiv:2010.11929,
table 1); giant is ViT-g (Zhai et al. 2022, arXiv:2106.04560, table 2). DINOv3's are those of
`dinov3/hub/backbones.py` of facebookresearch/dinov3 (Simeoni et al. 2025, arXiv:2508.10104).
SigLIP's are the image towers of SigLIP (Zhai et al. 2023, arXiv:2303.15343; `configs/proj/
image_text/README_siglip2.md` of google-research/big_vision for SigLIP 2, which adds the giant one).
"""

from __future__ import annotations

from typing import Any

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, shown
from vit_common.families import DINOv3ViTConfig, SiglipVisionConfig

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


def preset(name: str, **overrides: Any) -> ViTConfig:
    """The configuration of a named size; `overrides` are fields of its class, `ViTConfig` or that
    of the family in the name.

    Raises:
        ConfigError: no such name.
    """
    if name in _DINOV3:
        return DINOv3ViTConfig(**{**_dinov3(name), **overrides})
    if name in _SIGLIP:
        return SiglipVisionConfig(**{**_siglip(name), **overrides})
    if name not in PRESETS:
        names = ", ".join((*PRESETS, *_DINOV3, *_SIGLIP))
        raise ConfigError(f"preset: `name` must be one of {names}; given {shown(name)}.")
    width, depth, heads, inner, patch = PRESETS[name]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "patch_size": patch,
    }
    return ViTConfig(**{**sizes, **overrides})
