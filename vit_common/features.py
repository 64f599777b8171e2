"""Image features: which tokens of a network's output they come from."""

from __future__ import annotations

from typing import Any, Literal

from vit_common.config import ViTConfig

__all__ = ["features_pool", "pooled_tokens"]


def features_pool(config: ViTConfig) -> Literal["cls", "mean"]:
    """Source of an image's features: the class token, or without one the mean of the patches."""
    return "cls" if config.use_cls_token else "mean"


def pooled_tokens(hidden_states: Any, config: ViTConfig, pool: str | None = "auto") -> Any:
    """Tokens (B, S, D) of one block as one vector per image, (B, D).

    Args:
        hidden_states: array of any framework.
        config: configuration of the network.
        pool: "cls" for the class token, "mean" for the mean of the patches, "auto" for
            `features_pool`; None leaves all tokens.

    Example:
        >>> pooled_tokens(model(pixel_values).last_hidden_state, model.config).shape
        (1, 768)
    """
    if pool == "auto":
        pool = features_pool(config)
    if pool == "cls":
        return hidden_states[:, 0]
    return hidden_states[:, config.num_prefix_tokens :].mean(1) if pool == "mean" else hidden_states
