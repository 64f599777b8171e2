"""`parameter_shapes`: canonical name -> shape of every weight a model has.

The canonical names are those of Hub files as Transformers v4 writes them, the shapes those of
PyTorch layouts. Both twins hold exactly these parameters and every foreign format maps to them,
so this table is the contract between the networks, the files and the converter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from vit_common.config import ViTConfig
from vit_common.config_fields import STEM_KERNELS, STEM_NARROWING, STEM_WIDENING
from vit_common.positions import relative_distances

Shapes = dict[str, tuple[int, ...]]
"""Name of a parameter -> its shape."""

Head = Literal["classifier", "teacher", "decoder", "tokens", "projection", "towers"]
"""Head on the base network: one classifier; DeiT's two, on the class and the distillation token; a
decoder back to pixels; BEiT's prediction of visual tokens; CLIP's projection of one tower, or both
towers of CLIP or SigLIP."""

_CLASSES: dict[Head | None, str] = {
    None: "Model",
    "classifier": "ForImageClassification",
    "teacher": "ForImageClassificationWithTeacher",
    "decoder": "ForMaskedImageModeling",
    "tokens": "ForMaskedImageModeling",
    "projection": "ModelWithProjection",
    "towers": "Model",
}


def class_name(config: ViTConfig, head: Head | None) -> str:
    """Name of the PyTorch class of a network with that head; that of JAX begins with "Flax"."""
    tower = ""
    if config.is_part and head in (None, "projection"):
        tower = "Text" if config.is_text else "Vision"
    return config.class_stem() + tower + _CLASSES[head]


def head_tokens(
    config: ViTConfig, head: Head | None, *, add_pooling_layer: bool = True
) -> int | None:
    """Number of leading tokens that the head uses; None where patches are among them.

    Args:
        config: the sizes.
        head: as in `parameter_shapes`; for a base network the pooler counts.
        add_pooling_layer: whether a base network has a pooler; without one a token is enough.
    """
    if head == "teacher":
        return 2
    if head is None:
        pools = add_pooling_layer and not config.keeps_pooler
        by_attention = add_pooling_layer and config.pooler_type == "map"
        return None if by_attention or (pools and config.pooling == "mean") else 1
    if head == "projection":
        return 1
    return 1 if head == "classifier" and config.pooling == "cls" else None


HEAD_PARAMETERS = (
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "pooler.",
    "decoder.",
    "lm_layernorm.",
    "lm_head.",
    "embeddings.mask_token",
    "visual_projection.",
    "text_projection.",
    "text_model.",
    "logit_scale",
    "logit_bias",
)
"""Starts of (unprefixed) names that a checkpoint of the same network may lack or have in excess:
they belong to a task, so they are drawn anew, or left aside, where everything else must fit."""


TOP_PARAMETERS = (
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "decoder.",
    "lm_layernorm.",
    "lm_head.",
    "visual_projection.",
    "text_projection.",
    "text_model.",
    "logit_scale",
    "logit_bias",
)
"""Starts of the names that stand beside the base network, not in it."""


def parameter_shapes(
    config: ViTConfig,
    head: Head | None = None,
    *,
    add_pooling_layer: bool = True,
    use_mask_token: bool = False,
) -> Shapes:
    """Name and shape of every parameter, in the order of the network.

    Args:
        config: sizes and parts of the network.
        head: None for the base network, else what stands on it. With a head (and where
            `config.is_part`, always) the names of the network start with
            `config.base_model_prefix`, it has a pooler only if the classifier looks at it or
            `config.keeps_pooler`, and "decoder" has a mask token.
        add_pooling_layer: whether the base network has a pooler.
        use_mask_token: whether the base network has a mask token, if the config does not say so.

    Returns:
        Shapes in PyTorch's layouts: dense weights (out, in), the patch projection (D, C, P, P).
    """
    if config.is_text:
        return _text_tower(config, head)
    if head == "towers":
        return _towers(config)
    D, A = config.hidden_size, config.num_attention_heads
    shapes: Shapes = {}
    if config.use_cls_token:
        shapes["embeddings.cls_token"] = (1, 1, D)
    if config.use_distillation_token:
        shapes["embeddings.distillation_token"] = (1, 1, D)
    if config.num_register_tokens:
        shapes["embeddings.register_tokens"] = (1, config.num_register_tokens, D)
    if head == "decoder" or config.use_mask_token or (head is None and use_mask_token):
        shapes["embeddings.mask_token"] = (1, 1, D)
    if config.use_absolute_position_embeddings:
        positions = config.num_prefix_positions + config.num_patches
        shapes["embeddings.position_embeddings"] = (1, positions, D)
    if config.stem_type is not None:
        shapes |= _stem_shapes(config)
    projection = (D, config.stem_channels, *config.patch_kernel_size)
    shapes["embeddings.patch_embeddings.projection.weight"] = projection
    if config.use_patch_bias:
        shapes["embeddings.patch_embeddings.projection.bias"] = (D,)
    if config.use_pre_norm:
        shapes |= _norm(config, "pre_layernorm")
    if config.use_shared_relative_position_bias:
        shapes |= _relative(config, "encoder.relative_position_bias")
    if config.rope_type == "mixed":
        frequencies = (2, config.num_hidden_layers, A, config.head_dim // 2)
        shapes["encoder.rope_frequencies"] = frequencies
    shapes |= _blocks(config)
    if config.has_final_norm:
        shapes |= _norm(config, "layernorm")

    has_pooler = config.classifier_has_pooler if head == "classifier" else head is None
    has_pooler = has_pooler or config.keeps_pooler
    if has_pooler and (head is not None or add_pooling_layer):
        if config.pooler_type == "dense":
            shapes["pooler.dense.weight"] = (config.pooler_output_size, D)
            shapes["pooler.dense.bias"] = (config.pooler_output_size,)
        elif config.pooler_type == "norm":
            shapes |= _norm(config, "pooler.layernorm")
        elif config.pooler_type == "map":
            shapes |= _attention_pooler(config)
    if head is None and not config.is_part:
        return shapes

    shapes = {f"{config.base_model_prefix}.{name}": shape for name, shape in shapes.items()}
    if head == "classifier":
        shapes["classifier.weight"] = (config.num_labels, config.classifier_width)
        shapes["classifier.bias"] = (config.num_labels,)
    elif head == "teacher":
        for name in ("cls_classifier", "distillation_classifier"):
            shapes[f"{name}.weight"] = (config.num_labels, D)
            shapes[f"{name}.bias"] = (config.num_labels,)
    elif head == "projection":
        shapes["visual_projection.weight"] = (config.projection_dim, D)
    elif head == "tokens":
        vocabulary: int = config.vocab_size
        shapes |= _norm(config, "lm_layernorm")
        shapes["lm_head.weight"] = (vocabulary, D)
        shapes["lm_head.bias"] = (vocabulary,)
    elif head == "decoder":
        pixels = config.encoder_stride**2 * config.num_channels
        shapes["decoder.0.weight"] = (pixels, D, 1, 1)
        shapes["decoder.0.bias"] = (pixels,)
    return shapes


def block_names(config: ViTConfig) -> Iterator[str]:
    """Starts of the names of each block's parameters: of block i `encoder.layer.{i}`, and of each
    attention and MLP beside its first ones `encoder.layer.{i}.branch.{j}`, j from 1 on."""
    for i in range(config.num_hidden_layers):
        yield f"encoder.layer.{i}"
        for j in range(1, config.num_parallel_branches):
            yield f"encoder.layer.{i}.branch.{j}"


DIFFERENTIAL = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
"""Vectors from which differential attention computes the share of its second map."""
DIFFERENTIAL_STD = 0.1
"""Standard deviation of the normal distribution that draws them, whatever `initializer_range` is
(Ye et al. 2024, arXiv:2410.05258, in their code; `DiffAttention.reset_parameters` of timm
1.0.31)."""


def _blocks(config: ViTConfig) -> Shapes:
    """The parameters of all blocks, of an image's network or of a text tower."""
    D, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {}
    biases = {
        "query": config.has_query_bias,
        "key": config.has_key_bias,
        "value": config.has_value_bias,
    }
    for layer in block_names(config):
        for name, use_bias in biases.items():
            shapes[f"{layer}.attention.attention.{name}.weight"] = (D, D)
            if use_bias:
                shapes[f"{layer}.attention.attention.{name}.bias"] = (D,)
        if config.attention_type == "differential":
            module = f"{layer}.attention.attention.differential"
            shapes |= {f"{module}.{name}": (config.head_dim // 2,) for name in DIFFERENTIAL}
            shapes[f"{module}.norm.weight"] = (config.head_dim,)
        if config.use_relative_position_bias:
            shapes |= _relative(config, f"{layer}.attention.attention.relative_position_bias")
        if config.use_qk_norm:
            shapes |= _norm(config, f"{layer}.attention.attention.query_norm", config.head_dim)
            shapes |= _norm(config, f"{layer}.attention.attention.key_norm", config.head_dim)
        if config.use_attention_norm:
            shapes |= _norm(config, f"{layer}.attention.output.layernorm")
        shapes[f"{layer}.attention.output.dense.weight"] = (D, D)
        if config.proj_bias:
            shapes[f"{layer}.attention.output.dense.bias"] = (D,)
        first = 2 * inner if config.use_swiglu_ffn else inner
        shapes[f"{layer}.intermediate.dense.weight"] = (first, D)
        if config.mlp_bias:
            shapes[f"{layer}.intermediate.dense.bias"] = (first,)
        if config.use_mlp_input_norm:
            shapes |= _norm(config, f"{layer}.intermediate.layernorm")
        if config.use_mlp_norm:
            shapes |= _norm(config, f"{layer}.output.layernorm", inner)
        shapes[f"{layer}.output.dense.weight"] = (D, inner)
        if config.mlp_bias:
            shapes[f"{layer}.output.dense.bias"] = (D,)
        parallel = config.block_type == "parallel"
        shapes |= _norm(config, f"{layer}.layernorm_before")
        if not parallel:
            shapes |= _norm(config, f"{layer}.layernorm_after")
        if config.has_layer_scale:
            shapes[f"{layer}.lambda_1"] = (D,)
        if config.has_mlp_layer_scale:
            shapes[f"{layer}.lambda_2"] = (D,)
    return shapes


def _norm(config: ViTConfig, name: str, width: int | None = None) -> Shapes:
    """The parameters of a norm; `width` None is `hidden_size`."""
    shapes: Shapes = {f"{name}.weight": (width or config.hidden_size,)}
    if config.norm_type == "layernorm":
        shapes[f"{name}.bias"] = shapes[f"{name}.weight"]
    return shapes


def _relative(config: ViTConfig, module: str) -> Shapes:
    """The parameters that give the biases of offsets."""
    A, inner = config.num_attention_heads, config.relative_position_width
    if config.relative_position_type == "table":
        rows = relative_distances(config.grid_size)
        return {f"{module}.relative_position_bias_table": (rows, A)}
    shapes: Shapes = {"in_kernel": (2, inner), "in_bias": (inner,)}
    shapes |= {"out_kernel": (inner, A), "out_bias": (A,)}
    return {f"{module}.{name}": shape for name, shape in shapes.items()}


def _stem_shapes(config: ViTConfig) -> Shapes:
    """The parameters of the network before the patch projection."""
    if config.stem_type == "mbconv":
        return _mbconv_shapes(config)
    if config.stem_type == "convolutions":
        (first, second), width = STEM_KERNELS, config.stem_width
        return {
            "embeddings.stem.convolution.weight": (width, config.num_channels, first, first),
            "embeddings.stem.convolution.bias": (width,),
            "embeddings.stem.convolution2.weight": (width, width, second, second),
            "embeddings.stem.convolution2.bias": (width,),
        }
    shapes: Shapes = {}
    folded = config.stem_type == "resnetd"

    def add(module: str, number: str, inputs: int, features: int, size: int = 1) -> None:
        conv = "convolution" if number == "" else f"conv{number}"
        shapes[f"{module}.{conv}.weight"] = (features, inputs, size, size)
        if folded:
            shapes[f"{module}.{conv}.bias"] = (features,)
            return
        for leaf in ("weight", "bias"):
            shapes[f"{module}.norm{number}.{leaf}"] = (features,)

    inputs = config.stem_width
    if folded:  # three convolutions of 3 x 3 for one of 7 x 7
        root = "embeddings.stem.convolution"
        widths = (config.num_channels, inputs // 2, inputs // 2, inputs)
        for number, before, after in zip(("", "2", "3"), widths, widths[1:], strict=False):
            shapes[f"{root}{number}.weight"] = (after, before, 3, 3)
            shapes[f"{root}{number}.bias"] = (after,)
    else:
        add("embeddings.stem", "", config.num_channels, inputs, 7)
    for i, features in enumerate(config.stem_widths):
        inner = features // STEM_NARROWING
        for j in range(config.stem_depths[i]):
            block = f"embeddings.stem.stage{i}.{j}"
            if j == 0:
                add(block, "_shortcut", inputs, features)
            add(block, "1", inputs, inner)
            add(block, "2", inner, inner, 3)
            add(block, "3", inner, features)
            inputs = features
    return shapes


def _mbconv_shapes(config: ViTConfig) -> Shapes:
    """The parameters of MBConv blocks before the patch projection."""
    shapes: Shapes = {}

    def convolution(name: str, features: int, inputs: int, size: int = 1) -> None:
        shapes[f"embeddings.stem.{name}.weight"] = (features, inputs, size, size)
        shapes[f"embeddings.stem.{name}.bias"] = (features,)

    def norm(name: str, features: int) -> None:
        for leaf in ("weight", "bias"):
            shapes[f"embeddings.stem.{name}.{leaf}"] = (features,)

    width = inputs = config.stem_width
    convolution("convolution", width, config.num_channels, 3)
    norm("norm", width)
    convolution("convolution2", width, width, 3)
    for i, features in enumerate(config.stem_widths):
        inner = STEM_WIDENING * features
        for j in range(config.stem_depths[i]):
            block = f"stage{i}.{j}"
            if inputs != features:
                convolution(f"{block}.conv_shortcut", features, inputs)
            norm(f"{block}.norm", inputs)
            convolution(f"{block}.conv1", inner, inputs)
            convolution(f"{block}.conv2", inner, 1, 3)  # of each channel by itself
            convolution(f"{block}.conv3", features, inner)
            inputs = features
    norm("norm_out", inputs)
    return shapes


def _attention_pooler(config: ViTConfig) -> Shapes:
    D, inner = config.hidden_size, config.pooler_inner
    shapes: Shapes = {"pooler.probe": (1, 1, D)}

    def add_dense(name: str, features: int, inputs: int) -> None:
        shapes[f"pooler.{name}.weight"] = (features, inputs)
        shapes[f"pooler.{name}.bias"] = (features,)

    for name in ("query", "key", "value", "output.dense"):
        add_dense(f"attention.{name}", D, D)
    shapes |= _norm(config, "pooler.layernorm")
    add_dense("intermediate.dense", inner, D)
    add_dense("output.dense", D, inner)
    return shapes


def _text_tower(config: Any, head: Head | None) -> Shapes:
    """The text tower of a CLIP or SigLIP, whose blocks are those of an image's."""
    D = config.hidden_size
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config.vocab_size, D),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, D),
        **_blocks(config),
        **_norm(config, "final_layernorm"),
    }
    if "projection_size" in config.fields:
        shapes["head.weight"] = (config.projection_size, D)
        shapes["head.bias"] = (config.projection_size,)
    shapes = {f"{config.base_model_prefix}.{name}": shape for name, shape in shapes.items()}
    if head == "projection":
        shapes["text_projection.weight"] = (config.projection_dim, D)
    return shapes


def _towers(config: Any) -> Shapes:
    """Both towers of a CLIP or SigLIP, CLIP's projections, and the scale of the similarities, which
    in SigLIP has a bias."""
    vision, text = config.vision_config, config.text_config
    shapes = {**parameter_shapes(vision), **_text_tower(text, None)}
    if "projection_dim" not in config.fields:
        return {**shapes, "logit_scale": (1,), "logit_bias": (1,)}
    return {
        **shapes,
        "visual_projection.weight": (config.projection_dim, vision.hidden_size),
        "text_projection.weight": (config.projection_dim, text.hidden_size),
        "logit_scale": (),
    }


_NORMAL = (
    "cls_token",
    "distillation_token",
    "position_embeddings",
    "probe",
    "in_kernel",
    "out_kernel",
)


Initial = Literal[
    "normal", "one", "zero", "layer scale", "logit scale", "frequencies", "differential"
]


def initial_value(name: str) -> Initial:
    """What a new parameter of that canonical name starts as; "normal" is the truncated one."""
    if name == "logit_scale":
        return "logit scale"
    *_, owner, leaf = ("", *name.split("."))
    if leaf in _NORMAL:
        return "normal"
    if leaf in DIFFERENTIAL:
        return "differential"
    if leaf in ("lambda_1", "lambda_2"):
        return "layer scale"
    if leaf == "rope_frequencies":
        return "frequencies"
    if leaf != "weight":
        return "zero"
    return "one" if "norm" in owner else "normal"
