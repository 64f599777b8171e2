"""Number of operations per image, from the configuration alone."""

from __future__ import annotations

from vit_common.config import ViTConfig
from vit_common.parameters import Head


def multiply_adds(
    config: ViTConfig,
    head: Head | None = "classifier",
    *,
    front_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> int:
    """Multiply-adds of one forward pass over one image.

    Matrix products only: patch projection, attention with both of its S x S products, MLP and
    head. Norms, softmax, activations and biases are left out; they are less than one percent.
    The pooler of the base network is not counted.

    Args:
        config: sizes of the network.
        head: as in `parameter_shapes`; None leaves the head out.
        front_tokens: number of tokens that the last block computes; None means all.
        image_size: (H, W) of the image in pixels; None means the native size.
    """
    D, inner = config.hidden_size, config.intermediate_size
    (H, W), P = image_size or config.image_height_width, config.patch_height_width
    N = (H // P[0]) * (W // P[1])
    S = config.num_prefix_tokens + N
    # For each token: query and output, both products of attention, MLP; then key and value.
    token = 2 * D * D + 2 * S * D + (3 if config.use_swiglu_ffn else 2) * D * inner
    branches = config.num_parallel_branches
    block = branches * (S * token + 2 * S * D * D)
    total = N * P[0] * P[1] * config.num_channels * D + config.num_hidden_layers * block
    if front_tokens is not None and config.num_hidden_layers:
        total -= max(0, S - front_tokens) * branches * token
    if head == "classifier":
        total += config.classifier_width * config.num_labels
        if config.use_representation_layer:
            total += D * config.pooler_output_size
    elif head == "teacher":
        total += 2 * D * config.num_labels
    elif head == "tokens":
        total += N * D * config.vocab_size
    elif head == "decoder":
        total += N * D * config.encoder_stride**2 * config.num_channels
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
