"""Number of operations per image, from the configuration alone."""

from __future__ import annotations

from typing import Any

from vit_common.config import ViTConfig
from vit_common.config_fields import STEM_KERNELS, STEM_NARROWING, STEM_WIDENING
from vit_common.parameters import Head


def multiply_adds(
    config: ViTConfig,
    head: Head | None = "classifier",
    *,
    front_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> int:
    """Multiply-adds of one forward pass over one image; of a text tower over one text.

    Matrix products only: the convolutions of a stem, the patch projection, attention with both of
    its S x S products, MLP and head. Norms, softmax, activations and biases are left out; they are
    less than one percent.
    The pooler of the base network is not counted; SigLIP's counts with the head that compares.

    Args:
        config: sizes of the network. A text has as many tokens as the text tower takes.
        head: as in `parameter_shapes`; None leaves the head out. "projection" is what turns an
            image, or a text, into what is compared; "towers" is one image and one text.
        front_tokens: number of tokens that the last block computes; None means all.
        image_size: (H, W) of the image in pixels; None means the native size.
    """
    if config.is_text:
        return _text(config, head)
    D = config.hidden_size
    (H, W), P = image_size or config.image_height_width, config.patch_height_width
    N = (H // P[0]) * (W // P[1])
    S = config.num_prefix_tokens + N
    token, block = _block(config, S)
    p, q = config.patch_kernel_size
    total = N * p * q * config.stem_channels * D + config.num_hidden_layers * block
    total += _stem(config, H, W)
    if front_tokens is not None and config.num_hidden_layers:
        total -= max(0, S - front_tokens) * token
    if head == "classifier":
        total += config.classifier_width * config.num_labels
        if config.use_representation_layer:
            total += D * config.pooler_output_size
        elif config.pooler_type == "map" and config.classifier_has_pooler:
            total += _attention_pooling(config, S)
    elif head in ("projection", "towers"):
        total += _attention_pooling(config, S) if config.pooler_type == "map" else 0
        if "projection_dim" in config.fields:
            total += D * config.projection_dim
        if head == "towers":
            texts = config.text_config
            projects = "projection_dim" in texts.fields
            total += _text(texts, "projection" if projects else None)
    elif head == "teacher":
        total += 2 * D * config.num_labels
    elif head == "tokens":
        total += N * D * config.vocab_size
    elif head == "decoder":
        total += N * D * config.encoder_stride**2 * config.num_channels
    return total


def _block(config: ViTConfig, S: int) -> tuple[int, int]:
    """Multiply-adds of a block for each token that comes out of it, and for all S tokens with their
    keys and values."""
    D, inner = config.hidden_size, config.intermediate_size
    # Query and output, both products of attention, MLP; then key and value.
    token = 2 * D * D + 2 * S * D + (3 if config.use_swiglu_ffn else 2) * D * inner
    token *= config.num_parallel_branches
    return token, S * token + config.num_parallel_branches * 2 * S * D * D


def _attention_pooling(config: ViTConfig, S: int) -> int:
    """Key and value of each token, both products of attention; query, output and MLP once."""
    D, pooled = config.hidden_size, S - config.first_pooled_token
    return 2 * pooled * (D * D + D) + 2 * D * D + 2 * D * config.pooler_inner


def _text(config: Any, head: Head | None) -> int:
    """Multiply-adds of a text tower over a text of as many tokens as it takes."""
    D = config.hidden_size
    total = config.num_hidden_layers * _block(config, config.max_position_embeddings)[1]
    if "projection_size" in config.fields:
        total += D * config.projection_size
    if head == "projection":
        total += D * config.projection_dim
    return int(total)


def _stem(config: ViTConfig, height: int, width: int) -> int:
    """Multiply-adds of the network before the patch projection."""
    if config.stem_type is None:
        return 0
    if config.stem_type == "convolutions":
        places, inputs, total = height * width, config.num_channels, 0
        for size in STEM_KERNELS:
            places //= size**2
            total += places * size**2 * inputs * config.stem_width
            inputs = config.stem_width
        return total
    height, width = -(-height // 2), -(-width // 2)
    if config.stem_type == "mbconv":
        return _mbconv(config, height, width)
    total = height * width * 49 * config.num_channels * config.stem_width
    if config.stem_type == "resnetd":
        half = config.stem_width // 2
        total = height * width * 9 * half * (config.num_channels + half + config.stem_width)
    height, width = -(-height // 2), -(-width // 2)
    inputs = config.stem_width
    for i, features in enumerate(config.stem_widths):
        inner = features // STEM_NARROWING
        for j in range(config.stem_depths[i]):
            before = height * width
            if i and j == 0:
                height, width = -(-height // 2), -(-width // 2)
            after = height * width
            total += before * inputs * inner + after * inner * (9 * inner + features)
            if j == 0:
                total += after * inputs * features
            inputs = features
    return total


def _mbconv(config: ViTConfig, height: int, width: int) -> int:
    """Multiply-adds of MBConv blocks, and of the two convolutions before them; (height, width) are
    what the first leaves of the image."""
    inputs = config.stem_width
    total = height * width * 9 * inputs * (config.num_channels + inputs)
    for i, features in enumerate(config.stem_widths):
        inner = STEM_WIDENING * features
        for j in range(config.stem_depths[i]):
            total += height * width * inputs * inner
            if j == 0:
                height, width = -(-height // 2), -(-width // 2)
            if inputs != features:
                total += height * width * inputs * features
            total += height * width * inner * (9 + features)
            inputs = features
    return total


def forward_flops(
    config: ViTConfig,
    head: Head | None = "classifier",
    *,
    front_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> int:
    """Floating point operations of one forward pass: two for each of `multiply_adds`."""
    return 2 * multiply_adds(config, head, front_tokens=front_tokens, image_size=image_size)
