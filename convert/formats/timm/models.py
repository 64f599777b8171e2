"""What timm's names of networks say that their weights do not.

Written by `tests/timm_table.py`, which asks timm 1.0.31 for the class and the arguments behind
each name; a test compares. What weights show by themselves is not here, nor what is of training
alone. Arguments are timm's own keywords, `norm_eps` aside, the epsilon that timm binds to a class.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """What timm builds for a name.

    Attributes:
        cls: name of timm's class.
        heads: number of attention heads.
        arguments: of the class, where they differ from its defaults.
    """

    cls: str
    heads: int
    arguments: Mapping[str, Any]


# Of each kind its class and arguments; then the number of heads, and the names that have it.
_KINDS = """
Beit init_values=0.1 use_abs_pos_emb=False use_rel_pos_bias=True
    12: beit_base_patch16_224 beit_base_patch16_384

Beit init_values=1e-05 use_abs_pos_emb=False use_rel_pos_bias=True
    12: beitv2_base_patch16_224
    16: beit_large_patch16_224 beit_large_patch16_384 beit_large_patch16_512
    beitv2_large_patch16_224

Eva attn_only_layer_scale=True attn_type='rope' global_pool='token' init_values=1.0
norm_layer='rmsnorm' norm_eps=1e-06 num_reg_tokens=8 qk_norm=True rope_rotate_half=True
rope_temperature=100 rope_type='dinov3' swiglu_mlp=True use_abs_pos_emb=False use_fc_norm=False
use_rot_pos_emb=True
    12: vit_base_patch16_sapiens2
    16: vit_huge_patch16_sapiens2 vit_large_patch16_sapiens2
    24: vit_giant_patch16_sapiens2
    32: vit_5b_patch16_sapiens2

Eva attn_pool_mlp_ratio=4.0 attn_pool_num_heads=8 attn_type='rope' class_token=False
global_pool='map' norm_layer='layernorm' norm_eps=1e-05 ref_feat_shape=(32,32)
rope_grid_indexing='xy' use_pre_transformer_norm=True use_rot_pos_emb=True
    16: vit_pe_core_gigantic_patch14_448

Eva attn_pool_mlp_ratio=4.0 attn_pool_num_heads=8 attn_type='rope' global_pool='map'
norm_layer='layernorm' norm_eps=1e-05 ref_feat_shape=(14,14) rope_grid_indexing='xy'
rope_grid_offset=1.0 use_pre_transformer_norm=True use_rot_pos_emb=True
    12: vit_pe_core_base_patch16_224

Eva attn_pool_mlp_ratio=4.0 attn_pool_num_heads=8 attn_type='rope' global_pool='map'
norm_layer='layernorm' norm_eps=1e-05 ref_feat_shape=(24,24) rope_grid_indexing='xy'
rope_grid_offset=1.0 use_pre_transformer_norm=True use_rot_pos_emb=True
    3: vit_pe_core_tiny_patch16_384
    6: vit_pe_core_small_patch16_384
    16: vit_pe_core_large_patch14_336

Eva attn_type='rope' class_token=False init_values=0.1 norm_layer='layernorm' norm_eps=1e-05
ref_feat_shape=(32,32) rope_grid_indexing='xy' use_fc_norm=False use_post_transformer_norm=False
use_pre_transformer_norm=True use_rot_pos_emb=True
    16: vit_pe_lang_gigantic_patch14_448 vit_pe_spatial_gigantic_patch14_448

Eva attn_type='rope' global_pool='token' init_values=1e-05 no_embed_class=True
rope_grid_indexing='xy' rope_temperature=10.0 rope_type='mixed' use_rot_pos_emb=True
    6: vit_small_patch16_rope_mixed_ape_224
    12: vit_base_patch16_rope_mixed_ape_224
    16: vit_large_patch16_rope_mixed_ape_224

Eva attn_type='rope' global_pool='token' init_values=1e-05 no_embed_class=True
rope_grid_indexing='xy' rope_temperature=100.0 use_rot_pos_emb=True
    6: vit_small_patch16_rope_ape_224
    12: vit_base_patch16_rope_ape_224
    16: vit_large_patch16_rope_ape_224

Eva attn_type='rope' global_pool='token' init_values=1e-05 rope_grid_indexing='xy'
rope_temperature=10.0 rope_type='mixed' use_abs_pos_emb=False use_rot_pos_emb=True
    6: vit_small_patch16_rope_mixed_224
    12: vit_base_patch16_rope_mixed_224
    16: vit_large_patch16_rope_mixed_224

Eva attn_type='rope' global_pool='token' init_values=1e-05 rope_grid_indexing='xy'
rope_temperature=100.0 use_abs_pos_emb=False use_fc_norm=False use_rot_pos_emb=True
    12: vit_base_patch16_rope_224

Eva attn_type='rope' global_pool='token' init_values=1e-05 rope_grid_indexing='xy'
rope_temperature=100.0 use_abs_pos_emb=False use_rot_pos_emb=True
    6: vit_small_patch16_rope_224
    16: vit_large_patch16_rope_224

Eva attn_type='rope' init_values=0.1 norm_layer='layernorm' norm_eps=1e-05 ref_feat_shape=(32,32)
rope_grid_indexing='xy' rope_grid_offset=1.0 use_fc_norm=False use_post_transformer_norm=False
use_pre_transformer_norm=True use_rot_pos_emb=True
    16: vit_pe_lang_large_patch14_448

Eva attn_type='rope' norm_layer='layernorm' norm_eps=1e-05 ref_feat_shape=(32,32)
rope_grid_indexing='xy' rope_grid_offset=1.0 use_fc_norm=False use_post_transformer_norm=False
use_pre_transformer_norm=True use_rot_pos_emb=True
    3: vit_pe_spatial_tiny_patch16_512
    6: vit_pe_spatial_small_patch16_512
    12: vit_pe_spatial_base_patch16_512
    16: vit_pe_spatial_large_patch14_448

Eva class_token=False init_values=1e-05 num_reg_tokens=1 qkv_bias=False ref_feat_shape=(16,16)
use_abs_pos_emb=False use_rot_pos_emb=True
    8: vit_mediumd_patch16_rope_reg1_gap_256

Eva class_token=False init_values=1e-05 num_reg_tokens=1 ref_feat_shape=(16,16)
use_abs_pos_emb=False use_rot_pos_emb=True
    8: vit_medium_patch16_rope_reg1_gap_256
    12: vit_base_patch16_rope_reg1_gap_256

Eva class_token=False init_values=1e-05 num_reg_tokens=4 ref_feat_shape=(16,16)
use_abs_pos_emb=False use_rot_pos_emb=True
    10: vit_betwixt_patch16_rope_reg4_gap_256

Eva global_pool='token' init_values=1e-05 norm_layer='layernorm' norm_eps=1e-05 num_reg_tokens=4
qkv_bias=False rope_rotate_half=True rope_temperature=100 rope_type='dinov3' swiglu_mlp=True
use_abs_pos_emb=False use_fc_norm=False use_rot_pos_emb=True
    24: vit_giant_patch16_lingbot

Eva global_pool='token' init_values=1e-05 norm_layer='layernorm' norm_eps=1e-05 num_reg_tokens=4
rope_rotate_half=True rope_temperature=100 rope_type='dinov3' use_abs_pos_emb=False
use_fc_norm=False use_rot_pos_emb=True
    6: vit_small_patch16_lingbot
    12: vit_base_patch16_lingbot
    16: vit_large_patch16_lingbot

Eva global_pool='token' ref_feat_shape=(16,16) scale_attn_inner=True scale_mlp=True swiglu_mlp=True
use_rot_pos_emb=True
    12: eva02_base_patch16_clip_224
    16: eva02_large_patch14_clip_224 eva02_large_patch14_clip_336

Eva global_pool='token' use_post_norm=True
    16: eva02_enormous_patch14_clip_224

Eva global_pool='token'
    16: eva_giant_patch14_clip_224

Eva init_values=1e-05 norm_layer='layernorm' norm_eps=1e-05 num_reg_tokens=4 qkv_bias=False
rope_rotate_half=True rope_temperature=100 rope_type='dinov3' swiglu_mlp=True use_abs_pos_emb=False
use_fc_norm=False use_rot_pos_emb=True
    6: vit_small_plus_patch16_dinov3
    20: vit_huge_plus_patch16_dinov3
    32: vit_7b_patch16_dinov3

Eva init_values=1e-05 norm_layer='layernorm' norm_eps=1e-05 num_reg_tokens=4 qkv_bias=False
rope_rotate_half=True rope_temperature=100 rope_type='dinov3' use_abs_pos_emb=False
use_fc_norm=False use_rot_pos_emb=True
    6: vit_small_patch16_dinov3
    12: vit_base_patch16_dinov3
    16: vit_large_patch16_dinov3

Eva init_values=1e-05 norm_layer='layernorm' norm_eps=1e-05 num_reg_tokens=4 rope_rotate_half=True
rope_temperature=100 rope_type='dinov3' swiglu_mlp=True use_abs_pos_emb=False use_fc_norm=False
use_rot_pos_emb=True
    6: vit_small_plus_patch16_dinov3_qkvb
    20: vit_huge_plus_patch16_dinov3_qkvb

Eva init_values=1e-05 norm_layer='layernorm' norm_eps=1e-05 num_reg_tokens=4 rope_rotate_half=True
rope_temperature=100 rope_type='dinov3' use_abs_pos_emb=False use_fc_norm=False use_rot_pos_emb=True
    3: vit_tiny_patch16_dinov3_qkvb
    6: vit_small_patch16_dinov3_qkvb
    12: vit_base_patch16_dinov3_qkvb
    16: vit_large_patch16_dinov3_qkvb

Eva ref_feat_shape=(16,16) scale_mlp=True swiglu_mlp=True use_rot_pos_emb=True
    12: eva02_base_patch14_224 eva02_base_patch14_448
    16: eva02_large_patch14_224 eva02_large_patch14_448

Eva ref_feat_shape=(16,16) swiglu_mlp=True use_rot_pos_emb=True
    3: eva02_tiny_patch14_224 eva02_tiny_patch14_336
    6: eva02_small_patch14_224 eva02_small_patch14_336

Eva
    16: eva_giant_patch14_224 eva_giant_patch14_336 eva_giant_patch14_560

NaFlexVit act_layer='gelu_tanh' pos_embed_interp_mode='bilinear'
    12: naflexvit_base_patch16_siglip
    16: naflexvit_so400m_patch16_siglip

NaFlexVit class_token=True final_norm=False global_pool='token' init_values=1e-05
pos_embed_align_corners=True pos_embed_antialias=False pos_embed_ar_preserving=True
pos_embed_interp_mode='bilinear' reg_tokens=7
    12: naflexvit_base_patch16_radio_v3

NaFlexVit class_token=True final_norm=False global_pool='token' init_values=1e-05
pos_embed_antialias=False pos_embed_ar_preserving=True pos_embed_interp_mode='bilinear' reg_tokens=7
    16: naflexvit_large_patch16_radio_v3

NaFlexVit class_token=True final_norm=False global_pool='token' pos_embed_align_corners=True
pos_embed_antialias=False pos_embed_ar_preserving=True pos_embed_interp_mode='bilinear' reg_tokens=7
    16: naflexvit_huge_patch16_radio_v3

NaFlexVit class_token=True final_norm=False global_pool='token' pos_embed_antialias=False
pos_embed_ar_preserving=True pos_embed_interp_mode='bilinear' reg_tokens=7
    24: naflexvit_giant_patch16_radio_v3

NaFlexVit class_token=True final_norm=False global_pool='token' pos_embed_antialias=False
pos_embed_ar_preserving=True pos_embed_interp_mode='bilinear' reg_tokens=9
    16: naflexvit_huge_patch16_radio_v4 naflexvit_so400m_patch16_radio_v4

NaFlexVit fc_norm=True global_pool='avg' init_values=1e-05 pos_embed='factorized'
pos_embed_ar_preserving=True reg_tokens=4
    12: naflexvit_base_patch16_parfac_gap

NaFlexVit fc_norm=True global_pool='avg' init_values=1e-05 pos_embed_ar_preserving=True reg_tokens=4
    12: naflexvit_base_patch16_par_gap

NaFlexVit fc_norm=True global_pool='avg' init_values=1e-05 qkv_bias=False reg_tokens=1
    13: naflexvit_so150m2_patch16_reg1_gap

NaFlexVit fc_norm=True global_pool='avg' init_values=1e-05 reg_tokens=4
    12: naflexvit_base_patch16_gap

NaFlexVit init_values=1e-05 qkv_bias=False reg_tokens=1
    13: naflexvit_so150m2_patch16_reg1_map

NaFlexVit init_values=1e-05 reg_tokens=1
    12: naflexvit_base_patch16_map

VisionTransformer act_layer='gelu_tanh' class_token=False fc_norm=False global_pool='avg'
    12: vit_base_patch32_siglip_gap_256
    16: vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384
    vit_large_patch16_siglip_gap_512 vit_so400m_patch16_siglip_gap_256
    vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512

VisionTransformer act_layer='gelu_tanh' class_token=False global_pool='map'
    12: vit_base_patch32_siglip_256
    16: vit_giantopt_patch16_siglip_256 vit_giantopt_patch16_siglip_384 vit_large_patch16_siglip_512
    vit_so400m_patch16_siglip_256 vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512

VisionTransformer act_layer='quick_gelu' norm_layer='layernorm' norm_eps=1e-05 pre_norm=True
    12: vit_base_patch16_clip_quickgelu_224 vit_base_patch32_clip_quickgelu_224
    16: vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_224
    vit_huge_patch14_clip_quickgelu_378 vit_large_patch14_clip_quickgelu_224
    vit_large_patch14_clip_quickgelu_336

VisionTransformer act_layer='silu' init_values=1.0 mlp_layer='GluMlp' no_embed_class=True
reg_tokens=1
    24: vit_giant_patch14_reg1_tipsv2

VisionTransformer act_layer='silu' init_values=1e-05 mlp_layer='GluMlp' no_embed_class=True
reg_tokens=4
    24: vit_giant_patch14_reg4_dinov2

VisionTransformer act_layer='silu' init_values=1e-05 mlp_layer='GluMlp'
    24: vit_giant_patch14_dinov2

VisionTransformer attn_layer='diff' class_token=False global_pool='avg' init_values=1e-05
no_embed_class=True reg_tokens=1
    4: vit_dwee_patch16_reg1_gap_256
    5: vit_dlittle_patch16_reg1_gap_256

VisionTransformer block_fn='DiffParallelScalingBlock' class_token=False global_pool='avg'
init_values=1e-05 no_embed_class=True reg_tokens=1
    4: vit_dpwee_patch16_reg1_gap_256

VisionTransformer block_fn='ParallelScalingBlock' class_token=False global_pool='avg'
init_values=1e-05 no_embed_class=True reg_tokens=1
    4: vit_pwee_patch16_reg1_gap_256

VisionTransformer block_fn='ParallelScalingBlock' no_embed_class=True norm_layer='rmsnorm'
pre_norm=True qk_norm=True qkv_bias=False
    12: vit_base_patch16_xp_224
    16: vit_huge_patch14_xp_224 vit_large_patch14_xp_224

VisionTransformer block_fn='ParallelThingsBlock' init_values=1e-05
    6: vit_small_patch16_18x2_224
    12: vit_base_patch16_18x2_224

VisionTransformer block_fn='ResPostBlock' class_token=False global_pool='avg' init_values=1e-05
qkv_bias=False
    12: vit_base_patch16_rpn_224

VisionTransformer class_token=False embed_layer='MbConvStages' global_pool='avg'
mlp_layer='GeGluMlp' pos_embed='none'
    16: vitamin_xlarge_256 vitamin_xlarge_336 vitamin_xlarge_384

VisionTransformer class_token=False embed_layer='MbConvStages' global_pool='avg'
mlp_layer='GeGluMlp'
    6: vitamin_small_224
    12: vitamin_base_224
    16: vitamin_large2_224 vitamin_large2_256 vitamin_large2_336 vitamin_large2_384
    vitamin_large_224 vitamin_large_256 vitamin_large_336 vitamin_large_384

VisionTransformer class_token=False fc_norm=False global_pool='avg' init_values=1e-06 qkv_bias=False
    8: vit_medium_patch16_gap_240 vit_medium_patch16_gap_256 vit_medium_patch16_gap_384
    10: vit_betwixt_patch16_gap_256

VisionTransformer class_token=False fc_norm=False global_pool='avg' reg_tokens=4
    14: vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_384

VisionTransformer class_token=False fc_norm=False global_pool='avg'
    12: vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256
    vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512
    16: vit_base_patch16_gap_224 vit_giant_patch16_gap_224 vit_huge_patch14_gap_224
    vit_huge_patch16_gap_448 vit_large_patch16_siglip_gap_256 vit_large_patch16_siglip_gap_384
    vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378
    vit_so400m_patch14_siglip_gap_384 vit_so400m_patch14_siglip_gap_448
    vit_so400m_patch14_siglip_gap_896

VisionTransformer class_token=False global_pool='avg' init_values=1e-05 no_embed_class=True
reg_tokens=1
    4: vit_wee_patch16_reg1_gap_256
    5: vit_little_patch16_reg1_gap_256
    8: vit_medium_patch16_reg1_gap_256
    10: vit_betwixt_patch16_reg1_gap_256

VisionTransformer class_token=False global_pool='avg' init_values=1e-05 no_embed_class=True
reg_tokens=4
    5: vit_little_patch16_reg4_gap_256
    8: vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256
    vit_mediumd_patch16_reg4_gap_384
    10: vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_384

VisionTransformer class_token=False global_pool='avg' init_values=1e-05 norm_layer='rmsnorm'
reg_tokens=1
    3: test_vit4

VisionTransformer class_token=False global_pool='avg' init_values=1e-05 qkv_bias=False reg_tokens=1
    13: vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384
    vit_so150m2_patch16_reg1_gap_448

VisionTransformer class_token=False global_pool='avg' init_values=1e-05 reg_tokens=1
    2: test_vit2

VisionTransformer class_token=False global_pool='avg' no_embed_class=True reg_tokens=4
    12: vit_base_patch16_reg4_gap_256

VisionTransformer class_token=False global_pool='map' init_values=1e-05 pool_include_prefix=True
reg_tokens=1
    3: test_vit3

VisionTransformer class_token=False global_pool='map' reg_tokens=4
    14: vit_so150m_patch16_reg4_map_256

VisionTransformer class_token=False global_pool='map'
    12: vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384
    vit_base_patch16_siglip_512
    16: vit_large_patch16_siglip_256 vit_large_patch16_siglip_384 vit_so400m_patch14_siglip_224
    vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384

VisionTransformer embed_layer='ConvStem' no_embed_class=True
    12: vit_base_mci_224

VisionTransformer embed_layer='FeatureListNet'
    8: vit_small_resnet26d_224 vit_small_resnet50d_s16_224
    12: vit_base_resnet26d_224 vit_base_resnet50d_224

VisionTransformer embed_layer='ResNetV2'
    6: vit_small_r26_s32_224 vit_small_r26_s32_384
    12: vit_base_r26_s32_224 vit_base_r50_s16_224 vit_base_r50_s16_384
    16: vit_large_r50_s32_224 vit_large_r50_s32_384

VisionTransformer embed_layer='Sequential'
    3: vit_tiny_r_s16_p8_224 vit_tiny_r_s16_p8_384

VisionTransformer final_norm=False init_values=0.1
    16: vit_intern300m_patch14_448

VisionTransformer final_norm=False init_values=1e-05 no_embed_class=True reg_tokens=7
    12: vit_base_patch16_radio_v3
    16: vit_large_patch16_radio_v3

VisionTransformer final_norm=False no_embed_class=True reg_tokens=7
    16: vit_huge_patch16_radio_v3
    24: vit_giant_patch16_radio_v3

VisionTransformer final_norm=False no_embed_class=True reg_tokens=9
    16: vit_huge_patch16_radio_v4 vit_so400m_patch16_radio_v4

VisionTransformer global_pool='avg' norm_layer='layernorm' norm_eps=1e-05 scale_attn_norm=True
scale_mlp_norm=True
    12: beit3_base_patch16_224
    16: beit3_giant_patch14_224 beit3_giant_patch14_336 beit3_large_patch16_224

VisionTransformer global_pool='avg'
    16: eva_large_patch14_196 eva_large_patch14_336

VisionTransformer init_values=1.0 no_embed_class=True reg_tokens=1
    12: vit_base_patch14_reg1_tipsv2
    16: vit_large_patch14_reg1_tipsv2 vit_so400m_patch14_reg1_tipsv2

VisionTransformer init_values=1e-05 no_embed_class=True reg_tokens=4
    6: vit_small_patch14_reg4_dinov2
    12: vit_base_patch14_reg4_dinov2
    16: vit_large_patch14_reg4_dinov2

VisionTransformer init_values=1e-05
    6: vit_small_patch14_dinov2 vit_small_patch16_36x1_224
    12: vit_base_patch14_dinov2
    14: vit_base_patch16_plus_240 vit_base_patch32_plus_256
    16: vit_large_patch14_dinov2

VisionTransformer init_values=1e-06 no_embed_class=True
    6: deit3_small_patch16_224 deit3_small_patch16_384
    8: deit3_medium_patch16_224
    12: deit3_base_patch16_224 deit3_base_patch16_384
    16: deit3_huge_patch14_224 deit3_large_patch16_224 deit3_large_patch16_384

VisionTransformer no_embed_class=True
    6: flexivit_small
    12: flexivit_base
    16: flexivit_large

VisionTransformer norm_layer='layernorm' norm_eps=1e-05 pre_norm=True
    4: vit_xsmall_patch16_clip_224
    8: vit_medium_patch16_clip_224 vit_medium_patch32_clip_224
    10: vit_betwixt_patch32_clip_224
    12: vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_base_patch32_clip_224
    vit_base_patch32_clip_256 vit_base_patch32_clip_384 vit_base_patch32_clip_448
    14: vit_base_patch16_plus_clip_240
    16: vit_giant_patch14_clip_224 vit_gigantic_patch14_clip_224 vit_gigantic_patch14_clip_378
    vit_huge_patch14_clip_224 vit_huge_patch14_clip_336 vit_huge_patch14_clip_378
    vit_large_patch14_clip_224 vit_large_patch14_clip_336

VisionTransformer qkv_bias=False
    12: vit_base_patch16_224_miil

VisionTransformer
    2: test_vit
    3: deit_tiny_patch16_224 vit_tiny_patch16_224 vit_tiny_patch16_384
    6: deit_small_patch16_224 vit_small_patch16_224 vit_small_patch16_384 vit_small_patch32_224
    vit_small_patch32_384 vit_small_patch8_224
    12: deit_base_patch16_224 deit_base_patch16_384 vit_base_patch16_224 vit_base_patch16_384
    vit_base_patch32_224 vit_base_patch32_384 vit_base_patch8_224
    16: vit_giant_patch14_224 vit_gigantic_patch14_224 vit_huge_patch14_224 vit_large_patch14_224
    vit_large_patch16_224 vit_large_patch16_384 vit_large_patch32_224 vit_large_patch32_384

VisionTransformerDistilled
    3: deit_tiny_distilled_patch16_224
    6: deit_small_distilled_patch16_224
    12: deit_base_distilled_patch16_224 deit_base_distilled_patch16_384

VisionTransformerRelPos block_fn='ResPostRelPosBlock' qkv_bias=False
    6: vit_relpos_small_patch16_rpn_224
    8: vit_relpos_medium_patch16_rpn_224
    12: vit_relpos_base_patch16_rpn_224

VisionTransformerRelPos block_fn='ResPostRelPosBlock'
    14: vit_relpos_base_patch32_plus_rpn_256

VisionTransformerRelPos class_token=True fc_norm=True qkv_bias=False
    12: vit_relpos_base_patch16_clsgap_224

VisionTransformerRelPos class_token=True global_pool='token' qkv_bias=False
    8: vit_relpos_medium_patch16_cls_224
    12: vit_relpos_base_patch16_cls_224

VisionTransformerRelPos fc_norm=True qkv_bias=False
    3: test_vit_relpos
    6: vit_relpos_small_patch16_224
    8: vit_relpos_medium_patch16_224
    12: vit_relpos_base_patch16_224

VisionTransformerRelPos qkv_bias=False shared_rel_pos=True
    6: vit_srelpos_small_patch16_224
    8: vit_srelpos_medium_patch16_224

VisionTransformerRelPos
    14: vit_relpos_base_patch16_plus_240

VisionTransformerSAM neck_chans=None use_abs_pos=False use_rel_pos=True
    12: samvit_base_patch16_224

VisionTransformerSAM use_rel_pos=True
    12: samvit_base_patch16
    16: samvit_huge_patch16 samvit_large_patch16
"""


def _parsed(text: str) -> dict[str, Architecture]:
    found = {}
    for kind in text.split("\n\n"):
        cls, *words = kind.split()
        arguments, heads = {}, 0
        for word in words:
            name, equals, value = word.partition("=")
            if equals:
                arguments[name] = ast.literal_eval(value)
            elif word.endswith(":"):
                heads = int(word[:-1])
            else:
                found[word] = Architecture(cls, heads, MappingProxyType(arguments))
    return found


ARCHITECTURES: dict[str, Architecture] = _parsed(_KINDS)
"""timm's name of a network -> what it builds."""

HEADS: dict[str, int] = {name: row.heads for name, row in ARCHITECTURES.items()}
"""timm's name of a network -> number of attention heads."""
