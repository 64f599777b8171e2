"""`parameter_shapes`: canonical name -> shape of every weight a model has.

The canonical names are those of Hub files as Transformers v4 writes them, the shapes those of
PyTorch layouts. Both twins hold exactly these parameters and every foreign format maps to them,
so this table is the contract between the networks, the files and the converter.
"""

from __future__ import annotations

from typing import Literal

from vit_common.config import ViTConfig

Head = Literal["classifier", "decoder"]

BASE_PREFIX = "vit."
"""What a model with a head puts before the names of the network under it."""

HEAD_PARAMETERS = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")
"""Starts of (unprefixed) names that a checkpoint of the same network may lack or have in excess:
they belong to a task, so they are drawn anew, or left aside, where everything else must fit."""


def parameter_shapes(
    config: ViTConfig,
    head: Head | None = None,
    *,
    add_pooling_layer: bool = True,
    use_mask_token: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the network.

    Args:
        config: the sizes.
        head: None for the base network, "classifier" for image classification, "decoder" for
            masked image modelling. With a head the names of the network start with `vit.`, it has
            no pooler, and "decoder" has a mask token.
        add_pooling_layer: whether the base network has a pooler.
        use_mask_token: whether the base network has a mask token.

    Returns:
        Shapes in PyTorch's layouts: dense weights (out, in), the patch projection (D, C, P, P).
    """
    D, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embeddings.cls_token": (1, 1, D)}
    if head == "decoder" or (head is None and use_mask_token):
        shapes["embeddings.mask_token"] = (1, 1, D)
    shapes["embeddings.position_embeddings"] = (1, config.num_patches + 1, D)
    shapes["embeddings.patch_embeddings.projection.weight"] = (
        D,
        config.num_channels,
        *config.patch_height_width,
    )
    shapes["embeddings.patch_embeddings.projection.bias"] = (D,)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes[f"{layer}.attention.attention.{name}.weight"] = (D, D)
            if config.qkv_bias:
                shapes[f"{layer}.attention.attention.{name}.bias"] = (D,)
        shapes[f"{layer}.attention.output.dense.weight"] = (D, D)
        shapes[f"{layer}.attention.output.dense.bias"] = (D,)
        shapes[f"{layer}.intermediate.dense.weight"] = (inner, D)
        shapes[f"{layer}.intermediate.dense.bias"] = (inner,)
        shapes[f"{layer}.output.dense.weight"] = (D, inner)
        shapes[f"{layer}.output.dense.bias"] = (D,)
        for norm in ("layernorm_before", "layernorm_after"):
            shapes[f"{layer}.{norm}.weight"] = (D,)
            shapes[f"{layer}.{norm}.bias"] = (D,)
    shapes["layernorm.weight"] = (D,)
    shapes["layernorm.bias"] = (D,)

    if head is None:
        if add_pooling_layer:
            shapes["pooler.dense.weight"] = (config.pooler_output_size, D)
            shapes["pooler.dense.bias"] = (config.pooler_output_size,)
        return shapes

    shapes = {BASE_PREFIX + name: shape for name, shape in shapes.items()}
    if head == "classifier":
        shapes["classifier.weight"] = (config.num_labels, D)
        shapes["classifier.bias"] = (config.num_labels,)
    else:
        pixels = config.encoder_stride**2 * config.num_channels
        shapes["decoder.0.weight"] = (pixels, D, 1, 1)
        shapes["decoder.0.bias"] = (pixels,)
    return shapes


def initial_value(name: str) -> Literal["normal", "one", "zero"]:
    """What a new parameter of that canonical name starts as; "normal" is the truncated one."""
    *_, owner, leaf = ("", *name.split("."))
    if leaf in ("cls_token", "position_embeddings"):
        return "normal"
    if leaf != "weight":
        return "zero"
    return "one" if owner.startswith("layernorm") else "normal"
