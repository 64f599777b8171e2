"""How timm is told of a network whose blocks are of another kind."""

from __future__ import annotations

from vit_common.config import ViTConfig


def cannot_hold(config: ViTConfig) -> str | None:
    """What keeps timm from building a network of such blocks by one of its names, or None."""
    if config.block_type == "parallel":
        published = config.norm_type == "rmsnorm" and config.use_qk_norm and not config.qkv_bias
        inside = config.use_attention_norm or config.use_mlp_norm or config.use_swiglu_ffn
        if not published or config.has_key_bias or inside:
            return (
                "timm's names have parallel blocks only with RMS norms, norms of query and key, no "
                "bias of query, key and value, and neither other norms inside nor a gated MLP"
            )
    if config.block_type == "post_norm" and config.has_layer_scale:
        return "timm's blocks with norms after attention and MLP have no layer scale"
    if config.num_parallel_branches not in (1, 2):
        return "timm's names have blocks of one or two branches only"
    if config.use_pre_norm == config.use_patch_bias and config.base_family == "vit":
        return "timm's patches have a bias where no norm stands before the blocks, and only there"
    if config.qkv_bias and not config.has_key_bias and config.base_family == "vit":
        return "timm's Vision Transformers have a bias of the key wherever query and value have one"
    return None


def timm_name(config: ViTConfig) -> str | None:
    """A name of timm's that has such blocks, whatever its sizes; None for other blocks."""
    if config.block_type == "parallel":
        return "vit_base_patch16_xp_224"
    if config.block_type == "post_norm":
        return "vit_base_patch16_rpn_224"
    return "vit_base_patch16_18x2_224" if config.num_parallel_branches > 1 else None
