"""What timm's names of Vision Transformers say that their weights do not.

Read from the models of timm 1.0.31 (`timm/models/vision_transformer.py`, `deit.py`, `beit.py`),
each built on the meta device: number of heads, activation and epsilon of the norms. Names whose
network is none of this project's (norm before the blocks, attention pooling, RMSNorm, parallel
blocks) are not here; their weights are refused by name.
"""

from __future__ import annotations

# heads -> names
_HEADS: dict[int, str] = {
    2: """
        test_vit test_vit2
    """,
    3: """
        deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 vit_tiny_patch16_224
        vit_tiny_patch16_384
    """,
    4: """
        vit_wee_patch16_reg1_gap_256
    """,
    5: """
        vit_little_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256
    """,
    6: """
        deit3_small_patch16_224 deit3_small_patch16_384 deit_small_distilled_patch16_224
        deit_small_patch16_224 flexivit_small vit_small_patch14_dinov2
        vit_small_patch14_reg4_dinov2 vit_small_patch16_224 vit_small_patch16_36x1_224
        vit_small_patch16_384 vit_small_patch32_224 vit_small_patch32_384 vit_small_patch8_224
    """,
    8: """
        deit3_medium_patch16_224 vit_medium_patch16_gap_240 vit_medium_patch16_gap_256
        vit_medium_patch16_gap_384 vit_medium_patch16_reg1_gap_256
        vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256
        vit_mediumd_patch16_reg4_gap_384
    """,
    10: """
        vit_betwixt_patch16_gap_256 vit_betwixt_patch16_reg1_gap_256
        vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_384
    """,
    12: """
        beit_base_patch16_224 beit_base_patch16_384 beitv2_base_patch16_224
        deit3_base_patch16_224 deit3_base_patch16_384 deit_base_distilled_patch16_224
        deit_base_distilled_patch16_384 deit_base_patch16_224 deit_base_patch16_384
        flexivit_base vit_base_patch14_dinov2 vit_base_patch14_reg1_tipsv2
        vit_base_patch14_reg4_dinov2 vit_base_patch16_224 vit_base_patch16_224_miil
        vit_base_patch16_384 vit_base_patch16_radio_v3 vit_base_patch16_reg4_gap_256
        vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256
        vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512 vit_base_patch32_224
        vit_base_patch32_384 vit_base_patch32_siglip_gap_256 vit_base_patch8_224
    """,
    13: """
        vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384
        vit_so150m2_patch16_reg1_gap_448
    """,
    14: """
        vit_base_patch16_plus_240 vit_base_patch32_plus_256 vit_so150m_patch16_reg4_gap_256
        vit_so150m_patch16_reg4_gap_384
    """,
    16: """
        beit_large_patch16_224 beit_large_patch16_384 beit_large_patch16_512
        beitv2_large_patch16_224 deit3_huge_patch14_224 deit3_large_patch16_224
        deit3_large_patch16_384 eva_large_patch14_196 eva_large_patch14_336 flexivit_large
        vit_base_patch16_gap_224 vit_giant_patch14_224 vit_giant_patch16_gap_224
        vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384
        vit_gigantic_patch14_224 vit_huge_patch14_224 vit_huge_patch14_gap_224
        vit_huge_patch16_gap_448 vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4
        vit_intern300m_patch14_448 vit_large_patch14_224 vit_large_patch14_dinov2
        vit_large_patch14_reg1_tipsv2 vit_large_patch14_reg4_dinov2 vit_large_patch16_224
        vit_large_patch16_384 vit_large_patch16_radio_v3 vit_large_patch16_siglip_gap_256
        vit_large_patch16_siglip_gap_384 vit_large_patch16_siglip_gap_512 vit_large_patch32_224
        vit_large_patch32_384 vit_so400m_patch14_reg1_tipsv2 vit_so400m_patch14_siglip_gap_224
        vit_so400m_patch14_siglip_gap_378 vit_so400m_patch14_siglip_gap_384
        vit_so400m_patch14_siglip_gap_448 vit_so400m_patch14_siglip_gap_896
        vit_so400m_patch16_radio_v4 vit_so400m_patch16_siglip_gap_256
        vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512
    """,
    24: """
        vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2
        vit_giant_patch16_radio_v3
    """,
}

# hidden_act, where it is not the exact GELU -> names
_ACTIVATIONS: dict[str, str] = {
    "gelu_pytorch_tanh": """
        vit_base_patch32_siglip_gap_256 vit_giantopt_patch16_siglip_gap_256
        vit_giantopt_patch16_siglip_gap_384 vit_large_patch16_siglip_gap_512
        vit_so400m_patch16_siglip_gap_256 vit_so400m_patch16_siglip_gap_384
        vit_so400m_patch16_siglip_gap_512
    """,
}

# layer_norm_eps, where it is not 1e-6 -> names
_EPS: dict[float, str] = {}


def _spread(table: dict) -> dict:
    return {name: value for value, names in table.items() for name in names.split()}


HEADS: dict[str, int] = _spread(_HEADS)
"""Architecture's name -> number of attention heads."""

ACTIVATIONS: dict[str, str] = _spread(_ACTIVATIONS)
"""Architecture's name -> `hidden_act`; "gelu" where it is not named."""

EPS: dict[str, float] = _spread(_EPS)
"""Architecture's name -> `layer_norm_eps`; 1e-6 where it is not named."""
