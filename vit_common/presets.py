"""Named model sizes, one row per model.

Sources: tiny and small are DeiT-Ti and DeiT-S (Touvron et al. 2021, arXiv:2012.12877, table 1);
base, large and huge are ViT-B, ViT-L and ViT-H (Dosovitskiy et al. 2021, arXiv:2010.11929,
table 1); giant is ViT-g (Zhai et al. 2022, arXiv:2106.04560, table 2).
"""

from __future__ import annotations

from typing import Any

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, shown

#      name       width  depth  heads  MLP width  patch side
PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (192, 12, 3, 768, 16),
    "small": (384, 12, 6, 1536, 16),
    "base": (768, 12, 12, 3072, 16),
    "large": (1024, 24, 16, 4096, 16),
    "huge": (1280, 32, 16, 5120, 14),
    "giant": (1408, 40, 16, 6144, 14),
}


def preset(name: str, **overrides: Any) -> ViTConfig:
    """The configuration of a named size; `overrides` are fields of `ViTConfig`.

    Raises:
        ConfigError: no such name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"preset: `name` must be one of {', '.join(PRESETS)}; given {shown(name)}."
        )
    width, depth, heads, inner, patch = PRESETS[name]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "patch_size": patch,
    }
    return ViTConfig(**{**sizes, **overrides})
