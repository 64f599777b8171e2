"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), in Flax linen.

Read top to bottom: embeddings, attention, MLP, block, encoder, heads. `vit_torch/model.py` is the
same text in PyTorch. Modules take images as (B, H, W, C); parameter names and the order of
operations are those of Transformers 4.57.6 (`models/vit/modeling_flax_vit.py`).

DeiT, BEiT and DINOv2 are the same network with other fields of the config.

B batch, C channels, H W pixels, P patch side, N patches, T tokens in front of them (the class
token), S = T + N tokens, D width, L layers, A heads, I MLP width, K labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.checks import (
    Interpolate,
    check_head_mask,
    check_image,
    check_labels,
    check_mask,
    check_rank,
    check_stride,
    check_token_labels,
    resolve_problem_type,
)
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.positions import relative_distances, relative_position_index, resize_matrices
from vit_flax.attention import attention, needs_no_kernel
from vit_flax.int8 import Dense
from vit_flax.layout import row_major
from vit_flax.norm import LayerNorm
from vit_flax.outputs import (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxDeiTForImageClassificationWithTeacherOutput,
    FlaxMaskedImageModelingOutput,
    FlaxMaskedLMOutput,
    FlaxSequenceClassifierOutput,
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str | Callable) -> Callable[[jax.Array], jax.Array]:
    """The function of `hidden_act` or `pooler_act`; a callable is taken as it is.

    In half precision it is computed in float32, as PyTorch's kernels do: JAX would round after
    every operation inside it, which doubles the error of a block.
    """
    function = name if callable(name) else ACTIVATIONS[name]

    def run(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)

    return run


REMAT_POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
"""What a block keeps for its gradient under gradient checkpointing, from the least to the most, by
the names of `jax.checkpoint_policies`."""

STACKED = "stacked"
"""The name that takes the place of a block's number where all are in one array each."""


class FlaxViTPart(nn.Module):
    """Base of every module here: sizes, dtypes, precision, kernel, and how blocks are run.

    Attributes:
        config: the sizes.
        dtype: compute dtype, also that of the residual stream.
        param_dtype: dtype of newly drawn parameters.
        precision: precision of every matrix product; None means JAX's default for the device.
        attn_implementation: the attention kernel, see `vit_flax.attention`.
        scan_layers: compile one block and run it L times, over stacked parameters.
        remat_policy: one of `REMAT_POLICIES`, for `config.gradient_checkpointing`.
        front_tokens: number of tokens, from the first, that the last block computes, for heads that
            use no others; None means all. `scan_layers` always computes all.
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    attn_implementation: str = "auto"
    scan_layers: bool = False
    remat_policy: str = "nothing_saveable"
    front_tokens: int | None = None


def options(part: FlaxViTPart) -> dict[str, Any]:
    """Fields that a module passes on to the modules inside it."""
    return {
        "config": part.config,
        "dtype": part.dtype,
        "param_dtype": part.param_dtype,
        "precision": part.precision,
        "attn_implementation": part.attn_implementation,
        "scan_layers": part.scan_layers,
        "remat_policy": part.remat_policy,
        "front_tokens": part.front_tokens,
    }


def initializer(std: float) -> Callable[..., jax.Array]:
    """Truncated normal of standard deviation `initializer_range`, cut at -2 and 2."""
    if std == 0.0:
        return nn.initializers.zeros
    # At most five deviations and at least float32: where the bound's probability rounds to zero,
    # JAX gives the bound itself for one number in 2^23, a hundred deviations off at std 0.02.
    bound = min(2.0 / std, 5.0)
    normal = nn.initializers.truncated_normal(std, lower=-bound, upper=bound)

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return normal(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    return draw


def dense(part: FlaxViTPart, features: int, use_bias: bool = True) -> Dense:
    return Dense(
        features,
        use_bias=use_bias,
        dtype=part.dtype,
        param_dtype=part.param_dtype,
        precision=part.precision,
        kernel_init=initializer(part.config.initializer_range),
        bias_init=nn.initializers.zeros,
    )


def convolution(
    part: FlaxViTPart, features: int, size: tuple[int, int], name: str | None = None
) -> nn.Conv:
    return nn.Conv(
        features,
        kernel_size=size,
        strides=size,
        padding="VALID",
        dtype=part.dtype,
        param_dtype=part.param_dtype,
        precision=part.precision,
        kernel_init=initializer(part.config.initializer_range),
        bias_init=nn.initializers.zeros,
        name=name,
    )


def layer_norm(part: FlaxViTPart) -> LayerNorm:
    return LayerNorm(
        epsilon=part.config.layer_norm_eps,
        dtype=part.dtype,
        param_dtype=part.param_dtype,
    )


class FlaxViTPatchEmbeddings(FlaxViTPart):
    """Cuts the image into patches and projects each to width D."""

    def setup(self):
        self.projection = convolution(self, self.config.hidden_size, self.config.patch_height_width)

    def __call__(self, pixel_values):
        embeddings = self.projection(pixel_values)  # (B, H/P, W/P, D)
        B, rows, columns, D = embeddings.shape
        return embeddings.reshape(B, rows * columns, D)  # (B, N, D)


class FlaxViTEmbeddings(FlaxViTPart):
    """Patches, masked ones replaced; then the tokens in front of them; then positions."""

    use_mask_token: bool = False

    def setup(self):
        config, D = self.config, self.config.hidden_size
        draw, zeros = initializer(config.initializer_range), nn.initializers.zeros
        tokens = []
        if config.use_cls_token:
            self.cls_token = self.param("cls_token", draw, (1, 1, D), self.param_dtype)
            tokens.append(self.cls_token)
        if config.use_distillation_token:
            self.distillation_token = self.param(
                "distillation_token", draw, (1, 1, D), self.param_dtype
            )
            tokens.append(self.distillation_token)
        if config.num_register_tokens:
            R = config.num_register_tokens
            self.register_tokens = self.param("register_tokens", zeros, (1, R, D), self.param_dtype)
            tokens.append(self.register_tokens)
        self.tokens = tokens
        if self.use_mask_token:
            self.mask_token = self.param("mask_token", zeros, (1, 1, D), self.param_dtype)
        if config.use_absolute_position_embeddings:
            positions = config.num_prefix_positions + config.num_patches
            self.position_embeddings = self.param(
                "position_embeddings", draw, (1, positions, D), self.param_dtype
            )
        self.patch_embeddings = FlaxViTPatchEmbeddings(**options(self))
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        *,
        bool_masked_pos=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        check_rank(pixel_values, "(batch, height, width, channels)")
        B, H, W, C = pixel_values.shape
        grid = check_image(C, H, W, self.config, interpolate=interpolate_pos_encoding)

        embeddings = self.patch_embeddings(pixel_values.astype(self.dtype))  # (B, N, D)
        if bool_masked_pos is not None:
            if not self.use_mask_token:
                raise InputError(
                    "`bool_masked_pos` needs a mask token; build the model with "
                    "`use_mask_token=True`."
                )
            check_mask(bool_masked_pos.shape, B, grid[0] * grid[1])
            mask = bool_masked_pos[:, :, None].astype(self.dtype)  # (B, N, 1)
            embeddings = embeddings * (1.0 - mask) + self.mask_token.astype(self.dtype) * mask

        D, k = self.config.hidden_size, self.config.num_prefix_positions
        prefix = [
            jnp.broadcast_to(token.astype(self.dtype), (B, token.shape[1], D))
            for token in self.tokens
        ]
        front = jnp.concatenate((*prefix, embeddings[:, :0]), axis=1)  # (B, T, D)
        embeddings = jnp.concatenate((front[:, :k], embeddings), axis=1)  # (B, k + N, D)
        if self.config.use_absolute_position_embeddings:
            embeddings = embeddings + self.positions(grid)
        if k < self.config.num_prefix_tokens:  # tokens without positions come in after them
            parts = (embeddings[:, :k], front[:, k:], embeddings[:, k:])
            embeddings = jnp.concatenate(parts, axis=1)  # (B, S, D)
        return row_major(self.dropout(embeddings, deterministic=deterministic))

    def positions(self, grid: tuple[int, int]):
        """Position embeddings (1, k + N, D) for a grid (rows, columns) of patches; k tokens in
        front of them have one."""
        positions = self.position_embeddings
        if grid == self.config.grid_size:
            return positions.astype(self.dtype)
        exact = jnp.promote_types(positions.dtype, jnp.float32)
        rows, columns = resize_matrices(self.config.position_resize, self.config.grid_size, grid)
        positions = positions.astype(exact)
        k = self.config.num_prefix_positions
        table = positions[0, k:].reshape(*self.config.grid_size, self.config.hidden_size)
        table = jnp.einsum(
            "Hh,Ww,hwd->HWd",
            jnp.asarray(rows, exact),
            jnp.asarray(columns, exact),
            table,
            precision="highest",
        )
        table = table.reshape(1, grid[0] * grid[1], self.config.hidden_size)  # (1, N, D)
        return jnp.concatenate((positions[:, :k], table), axis=1).astype(self.dtype)


class FlaxViTRelativePositionBias(FlaxViTPart):
    """A learned bias on the scores of each head for each offset between two tokens."""

    def setup(self):
        distances = relative_distances(self.config.grid_size)
        self.relative_position_bias_table = self.param(
            "relative_position_bias_table",
            nn.initializers.zeros,
            (distances, self.config.num_attention_heads),
            self.param_dtype,
        )

    def __call__(self, grid: tuple[int, int]):
        table = self.relative_position_bias_table
        table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
        if grid != self.config.grid_size:
            (h, w), (H, W), A = self.config.grid_size, grid, self.config.num_attention_heads
            source, target = (2 * h - 1, 2 * w - 1), (2 * H - 1, 2 * W - 1)
            rows, columns = resize_matrices("bilinear", source, target)
            offsets = jnp.einsum(
                "Hh,Ww,hwa->HWa",
                jnp.asarray(rows, table.dtype),
                jnp.asarray(columns, table.dtype),
                table[:-3].reshape(*source, A),
                precision="highest",
            )
            table = jnp.concatenate((offsets.reshape(target[0] * target[1], A), table[-3:]))
        bias = table[relative_position_index(grid)]  # (S, S, A)
        return bias.transpose(2, 0, 1)[None]  # (1, A, S, S)


class FlaxViTSelfAttention(FlaxViTPart):
    """Query, key and value of every head, and their attention; F tokens in front attend."""

    def setup(self):
        D = self.config.hidden_size
        self.query = dense(self, D, use_bias=self.config.qkv_bias)
        self.key = dense(self, D, use_bias=self.config.use_key_bias)
        self.value = dense(self, D, use_bias=self.config.qkv_bias)
        self.dropout = nn.Dropout(self.config.attention_probs_dropout_prob)
        if self.config.use_relative_position_bias:
            self.relative_position_bias = FlaxViTRelativePositionBias(**options(self))

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        *,
        head_mask=None,
        bias=None,
        grid: tuple[int, int] | None = None,
    ):
        """The context (B, F, D), and the probabilities (B, A, F, S) or None: see `attention`."""
        B, S, D = hidden_states.shape
        if self.config.use_relative_position_bias:
            own = self.relative_position_bias(grid or self.config.grid_size)
            bias = own if bias is None else bias + own  # (1, A, S, S)
        A = self.config.num_attention_heads
        front = hidden_states[:, : self.front_tokens]  # (B, F, D)
        F = front.shape[1]
        if bias is not None:
            bias = bias[:, :, :F]  # (1, A, F, S)
        query = self.query(front).reshape(B, F, A, D // A)  # (B, F, A, D/A)
        key = self.key(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        value = self.value(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        context, probabilities = attention(
            query,
            key,
            value,
            bias=bias,
            head_mask=head_mask,
            dropout=None if deterministic or self.dropout.rate == 0.0 else self.active_dropout,
            output_attentions=output_attentions,
            implementation=self.attn_implementation,
            precision=self.precision,
            inline=needs_no_kernel(self.attn_implementation),
        )
        return context.reshape(B, F, D), probabilities  # (B, F, D), (B, A, F, S)

    def active_dropout(self, probabilities):
        """Dropout as it is in training."""
        return self.dropout(probabilities, deterministic=False)


class FlaxViTSelfOutput(FlaxViTPart):
    """Mixes the heads."""

    def setup(self):
        self.dense = dense(self, self.config.hidden_size)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(self, hidden_states, deterministic: bool = True):
        hidden_states = self.dense(hidden_states)
        return self.dropout(hidden_states, deterministic=deterministic)


class FlaxViTAttention(FlaxViTPart):
    """Self-attention and the projection after it."""

    def setup(self):
        self.attention = FlaxViTSelfAttention(**options(self))
        self.output = FlaxViTSelfOutput(**options(self))

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        *,
        head_mask=None,
        bias=None,
        grid: tuple[int, int] | None = None,
    ):
        """(B, F, D), and the probabilities (B, A, F, S) or None."""
        context, probabilities = self.attention(
            hidden_states,
            deterministic,
            output_attentions,
            head_mask=head_mask,
            bias=bias,
            grid=grid,
        )
        return self.output(context, deterministic), probabilities


class FlaxViTIntermediate(FlaxViTPart):
    """First half of the MLP."""

    def setup(self):
        width = self.config.intermediate_size
        self.dense = dense(self, 2 * width if self.config.use_swiglu_ffn else width)

    def __call__(self, hidden_states):
        hidden_states = self.dense(hidden_states)  # (B, S, I), or (B, S, 2 I)
        if self.config.use_swiglu_ffn:
            gate, hidden_states = jnp.split(hidden_states, 2, axis=-1)
            return row_major(activation("silu")(gate) * hidden_states)  # (B, S, I)
        return row_major(activation(self.config.hidden_act)(hidden_states))


class FlaxViTOutput(FlaxViTPart):
    """Second half of the MLP."""

    def setup(self):
        self.dense = dense(self, self.config.hidden_size)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(self, hidden_states, deterministic: bool = True):
        hidden_states = self.dense(hidden_states)  # (B, S, D)
        return self.dropout(hidden_states, deterministic=deterministic)


class FlaxViTDropPath(nn.Module):
    """In training, zero for a share `rate` of the images; the rest is scaled up to make up for
    it."""

    def __call__(self, hidden_states, rate, deterministic: bool):
        if deterministic or rate is None:
            return hidden_states
        B, *rest = hidden_states.shape
        keep = 1.0 - rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (B, *(1 for _ in rest)))
        return jnp.where(kept, hidden_states / jnp.asarray(keep, hidden_states.dtype), 0.0)


class FlaxViTLayer(FlaxViTPart):
    """One pre-norm block: attention and MLP, each with a residual. With `front_tokens`, of those
    alone: the others are looked at, and nothing is made of them."""

    def setup(self):
        self.attention = FlaxViTAttention(**options(self))
        self.intermediate = FlaxViTIntermediate(**options(self))
        self.output = FlaxViTOutput(**options(self))
        self.layernorm_before = layer_norm(self)
        self.layernorm_after = layer_norm(self)
        self.drop_path = FlaxViTDropPath()
        if self.config.has_layer_scale:
            D, value = self.config.hidden_size, self.config.layer_scale_init_value
            start = nn.initializers.constant(value)
            self.lambda_1 = self.param("lambda_1", start, (D,), self.param_dtype)
            self.lambda_2 = self.param("lambda_2", start, (D,), self.param_dtype)

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        head_mask=None,
        bias=None,
        drop_path_rate=None,
        grid: tuple[int, int] | None = None,
    ):
        """(B, S, D), and the attention probabilities (B, A, S, S), None unless asked for.

        Args:
            hidden_states: (B, S, D).
            deterministic: no dropout.
            output_attentions: return the attention probabilities too.
            head_mask: broadcasts against (B, A, S, S).
            bias: added to the attention scores, as the one that all of BEiT's blocks share.
            drop_path_rate: how often, in training, an image goes around a branch; None is never.
            grid: rows and columns of patches, for BEiT's bias; None means those of the config.
        """
        attention_output, probabilities = self.attention(
            self.layernorm_before(hidden_states),
            deterministic,
            output_attentions,
            head_mask=head_mask,
            bias=bias,
            grid=grid,
        )
        if self.config.has_layer_scale:
            attention_output = attention_output * self.lambda_1.astype(self.dtype)
        attention_output = self.drop_path(attention_output, drop_path_rate, deterministic)
        hidden_states = attention_output + hidden_states[:, : self.front_tokens]
        mlp_output = self.intermediate(self.layernorm_after(hidden_states))
        mlp_output = self.output(mlp_output, deterministic)
        if self.config.has_layer_scale:
            mlp_output = mlp_output * self.lambda_2.astype(self.dtype)
        mlp_output = self.drop_path(mlp_output, drop_path_rate, deterministic)
        hidden_states = mlp_output + hidden_states
        return hidden_states, probabilities


class FlaxViTLayerCollection(FlaxViTPart):
    """The L blocks. (PyTorch's `ModuleList`; it gives parameters the path `layer/{i}`, or, with
    `scan_layers`, `layer/stacked` and an axis of L in front.)"""

    def setup(self):
        layer, L = FlaxViTLayer, self.config.num_hidden_layers
        if self.config.gradient_checkpointing:
            layer = nn.remat(
                FlaxViTLayer,
                static_argnums=(2, 3, 7),  # self is 0
                prevent_cse=not self.scan_layers,  # a loop's body is not merged with another's
                policy=getattr(jax.checkpoint_policies, self.remat_policy),
            )
        names = [STACKED] if self.scan_layers and L else [str(i) for i in range(L)]
        whole, last = options(self) | {"front_tokens": None}, options(self)
        self.layers = [
            layer(**(last if name == str(L - 1) else whole), name=name) for name in names
        ]

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        head_mask=None,
        bias=None,
        grid: tuple[int, int] | None = None,
    ):
        """`FlaxBaseModelOutput` of the last block; `head_mask` is (L, 1, A, 1, 1) or None."""

        def run(layer, hidden_states, layer_mask, rate):
            hidden_states, probabilities = layer(
                hidden_states, deterministic, output_attentions, layer_mask, bias, rate, grid
            )
            return hidden_states, (hidden_states if output_hidden_states else None, probabilities)

        all_hidden_states: list[jax.Array] = [hidden_states]
        all_attentions: list[jax.Array] = []
        rates = self.config.drop_path_rates
        if self.scan_layers and self.layers:
            scan = nn.scan(
                run,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=len(rates),
            )
            layer_rates = jnp.asarray(rates) if any(rates) else None
            hidden_states, (states, probabilities) = scan(
                self.layers[0], hidden_states, head_mask, layer_rates
            )
            all_hidden_states += [] if states is None else jnp.unstack(states)
            all_attentions += [] if probabilities is None else jnp.unstack(probabilities)
        else:
            for i, layer in enumerate(self.layers):
                layer_mask = None if head_mask is None else head_mask[i]
                hidden_states, (_, probabilities) = run(
                    layer, hidden_states, layer_mask, rates[i] or None
                )
                all_hidden_states.append(hidden_states)
                all_attentions.append(probabilities)
        return FlaxBaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class FlaxViTEncoder(FlaxViTPart):
    """The stack of blocks."""

    def setup(self):
        self.layer = FlaxViTLayerCollection(**options(self))
        if self.config.use_shared_relative_position_bias:
            self.relative_position_bias = FlaxViTRelativePositionBias(**options(self))

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        head_mask=None,
        grid: tuple[int, int] | None = None,
    ):
        """`FlaxBaseModelOutput` of the last block, before the final norm.

        Args:
            hidden_states: (B, S, D).
            deterministic: no dropout.
            output_attentions, output_hidden_states: return those of every block too.
            head_mask: (A,) or (L, A), multiplies the attention probabilities.
            grid: rows and columns of patches, for BEiT's bias; None means those of the config.
        """
        if head_mask is not None:
            head_mask = spread_head_mask(head_mask, self.config)
        shared = self.config.use_shared_relative_position_bias
        return self.layer(
            hidden_states,
            deterministic,
            output_attentions,
            output_hidden_states,
            head_mask=head_mask,
            bias=self.relative_position_bias(grid or self.config.grid_size) if shared else None,
            grid=grid,
        )


def spread_head_mask(head_mask, config: ViTConfig):
    """(A,) or (L, A) -> (L, 1, A, 1, 1): one factor a layer and head."""
    check_head_mask(head_mask.shape, config)
    if head_mask.ndim == 5:
        return head_mask
    L, A = config.num_hidden_layers, config.num_attention_heads
    return jnp.broadcast_to(head_mask, (L, A))[:, None, :, None, None]


def mean_of_patches(hidden_states, config: ViTConfig):
    """(B, S, D) -> (B, D): the mean of the tokens that are patches."""
    if hidden_states.shape[1] <= config.num_prefix_tokens:
        raise InputError("the mean of the patches needs all tokens: `front_tokens` must be None.")
    return jnp.mean(hidden_states[:, config.num_prefix_tokens :], axis=1)


class FlaxViTPooler(FlaxViTPart):
    """The class token, or the mean of the patches, through what `pooler_type` says: a dense layer
    and `pooler_act`, a norm, or nothing."""

    def setup(self):
        if self.config.pooler_type == "dense":
            self.dense = dense(self, self.config.pooler_output_size)
        elif self.config.pooler_type == "norm":
            self.layernorm = layer_norm(self)

    def __call__(self, hidden_states):
        mean = self.config.pooling == "mean"
        pooled = mean_of_patches(hidden_states, self.config) if mean else hidden_states[:, 0]
        if self.config.pooler_type == "norm":
            return self.layernorm(pooled)  # (B, D)
        if self.config.pooler_type == "token":
            return pooled  # (B, D)
        return activation(self.config.pooler_act)(self.dense(pooled))  # (B, pooler_output_size)


class FlaxViTModule(FlaxViTPart):
    """The base network: embeddings, encoder, final norm and, if asked for, the pooler.

    Attributes:
        add_pooling_layer: whether there is a pooler.
        use_mask_token: whether there is a mask token, for `bool_masked_pos`.
    """

    output_class = FlaxBaseModelOutputWithPooling  # no field: the family's own

    add_pooling_layer: bool = True
    use_mask_token: bool = False

    def setup(self):
        use_mask_token = self.use_mask_token or self.config.use_mask_token
        self.embeddings = FlaxViTEmbeddings(**options(self), use_mask_token=use_mask_token)
        self.encoder = FlaxViTEncoder(**options(self))
        if not self.config.norm_after_pooling:
            self.layernorm = layer_norm(self)
        if self.add_pooling_layer:
            self.pooler = FlaxViTPooler(**options(self))

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        bool_masked_pos=None,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxViTModel`, but `pixel_values` is (B, H, W, C)."""
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        hidden_states = self.embeddings(
            pixel_values,
            deterministic,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        P = self.config.patch_height_width
        outputs = self.encoder(
            hidden_states,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            head_mask=head_mask,
            grid=(pixel_values.shape[1] // P[0], pixel_values.shape[2] // P[1]),
        )
        last_hidden_state = outputs.last_hidden_state  # (B, S, D)
        if not self.config.norm_after_pooling:
            last_hidden_state = self.layernorm(last_hidden_state)
        pooled = self.pooler(last_hidden_state) if self.add_pooling_layer else None
        output = self.output_class(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if flags.return_dict else output.to_tuple()


def add_network(part: FlaxViTPart, *, add_pooling_layer: bool = False, **fields: Any) -> None:
    """Give a model with a head its base network, by the family's name for it: `vit`, `beit`, ..."""
    network = FlaxViTModule(**options(part), add_pooling_layer=add_pooling_layer, **fields)
    setattr(part, part.config.base_model_prefix, network)


def network_of(part: FlaxViTPart) -> FlaxViTModule:
    """The base network of a model with a head."""
    return getattr(part, part.config.base_model_prefix)


class FlaxViTForImageClassificationModule(FlaxViTPart):
    """The base network and a linear classifier on the class token, or on what `pooling` says."""

    def setup(self):
        add_network(self, add_pooling_layer=self.config.classifier_has_pooler)
        self.classifier = dense(self, self.config.num_labels)

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        labels=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxViTForImageClassification`, but `pixel_values` is
        (B, H, W, C)."""
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = network_of(self)(
            pixel_values,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        logits = self.classifier(classifier_input(outputs, self.config))  # (B, K)
        output = FlaxSequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if flags.return_dict else output.to_tuple()


def classifier_input(outputs, config: ViTConfig):
    """What the classifier looks at, (B, classifier_width)."""
    hidden_states = outputs.last_hidden_state
    if config.classifier_has_pooler:
        return outputs.pooler_output
    if config.pooling == "cls":
        return hidden_states[:, 0]
    mean = mean_of_patches(hidden_states, config)
    if config.pooling == "mean":
        return mean
    return jnp.concatenate((hidden_states[:, 0], mean), axis=1)


def classification_loss(logits, labels, config: ViTConfig):
    """Mean loss of `logits` (B, K): squared error, cross entropy (label -100 is left out) or
    binary cross entropy, as `problem_type` says or the labels' dtype tells."""
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    problem_type = resolve_problem_type(config, integer)
    check_labels(labels, problem_type, logits.shape[0], config.num_labels)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if problem_type == "regression":
        return jnp.mean((logits - labels.reshape(logits.shape).astype(logits.dtype)) ** 2)
    if problem_type == "single_label_classification":
        labels = labels.reshape(-1)  # (B,)
        counted = labels != -100
        # Traced labels cannot be looked at; one out of range makes the loss NaN, not another class.
        chosen = jnp.where(labels < 0, config.num_labels, labels)
        chosen = jnp.where(counted, chosen, 0)[:, None]
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)  # (B, K)
        losses = -jnp.take_along_axis(log_probabilities, chosen, axis=-1)[:, 0]  # (B,)
        return jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.sum(counted).astype(losses.dtype)
    labels = labels.astype(logits.dtype)
    losses = -labels * jax.nn.log_sigmoid(logits) - (1.0 - labels) * jax.nn.log_sigmoid(-logits)
    return jnp.mean(losses)


class FlaxDeiTForImageClassificationWithTeacherModule(FlaxViTPart):
    """The base network and two classifiers, on the class and the distillation token, whose logits
    are averaged."""

    def setup(self):
        add_network(self)
        self.cls_classifier = dense(self, self.config.num_labels)
        self.distillation_classifier = dense(self, self.config.num_labels)

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxDeiTForImageClassificationWithTeacher`, but
        `pixel_values` is (B, H, W, C)."""
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = network_of(self)(
            pixel_values,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])  # (B, K)
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        output = FlaxDeiTForImageClassificationWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if flags.return_dict else output.to_tuple()


class FlaxBeitForMaskedImageModelingModule(FlaxViTPart):
    """The base network and the prediction of a visual token for each patch."""

    def setup(self):
        add_network(self)
        self.lm_layernorm = layer_norm(self)
        self.lm_head = dense(self, self.config.vocab_size)

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        bool_masked_pos=None,
        head_mask=None,
        labels=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxBeitForMaskedImageModeling`, but `pixel_values` is
        (B, H, W, C)."""
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = network_of(self)(
            pixel_values,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        hidden_states = self.lm_layernorm(outputs.last_hidden_state)
        logits = self.lm_head(hidden_states[:, self.config.num_prefix_tokens :])  # (B, N, vocab)
        loss = None
        if labels is not None:
            loss = visual_token_loss(logits, labels, bool_masked_pos)
        output = FlaxMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if flags.return_dict else output.to_tuple()


def visual_token_loss(logits, labels, bool_masked_pos):
    """Mean cross entropy of the masked patches: logits (B, N, vocab), labels and mask (B, N)."""
    check_token_labels(labels, bool_masked_pos, logits.shape)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    counted = (bool_masked_pos != 0) & (labels != -100)
    # Traced labels cannot be looked at; one out of range makes the loss NaN, not another token.
    chosen = jnp.where(labels < 0, logits.shape[-1], labels)
    chosen = jnp.where(counted, chosen, 0)[:, :, None]
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(log_probabilities, chosen, axis=-1)[:, :, 0]  # (B, N)
    return jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.sum(counted).astype(losses.dtype)


class FlaxViTDecoder(FlaxViTPart):
    """A 1 x 1 convolution to the pixels of each token, and a pixel shuffle."""

    @nn.compact
    def __call__(self, hidden_states):
        side, C = self.config.encoder_stride, self.config.num_channels
        B, rows, columns, _ = hidden_states.shape
        pixels = convolution(self, side**2 * C, (1, 1), name="0")(hidden_states)
        pixels = pixels.reshape(B, rows, columns, C, side, side)
        pixels = pixels.transpose(0, 3, 1, 4, 2, 5)  # (B, C, rows, side, columns, side)
        return pixels.reshape(B, C, rows * side, columns * side)  # (B, C, H, W)


class FlaxViTForMaskedImageModelingModule(FlaxViTPart):
    """The base network and a decoder back to pixels (SimMIM, Xie et al. 2022, arXiv:2111.09886)."""

    def setup(self):
        add_network(self, use_mask_token=True)
        self.decoder = FlaxViTDecoder(**options(self))

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        bool_masked_pos=None,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxViTForMaskedImageModeling`, but `pixel_values` is
        (B, H, W, C). The reconstruction is (B, C, H, W)."""
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        if bool_masked_pos is not None:
            check_stride(self.config, pixel_values.shape[1], pixel_values.shape[2])
        outputs = network_of(self)(
            pixel_values,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        B, H, W, _ = pixel_values.shape
        P = self.config.patch_height_width
        rows, columns, D = H // P[0], W // P[1], self.config.hidden_size
        # With a distillation token Transformers' decoder still starts at the second token, so what
        # was trained there expects it.
        first = 1 if self.config.use_distillation_token else self.config.num_prefix_tokens
        patches = outputs.last_hidden_state[:, first : first + rows * columns]  # (B, N, D)
        patches = patches.reshape(B, rows, columns, D)
        reconstruction = self.decoder(patches)  # (B, C, H, W)
        loss = None
        if bool_masked_pos is not None:
            target = pixel_values.transpose(0, 3, 1, 2)  # (B, C, H, W)
            mask = bool_masked_pos.reshape(B, rows, columns)
            mask = mask.repeat(P[0], axis=1).repeat(P[1], axis=2)[:, None]  # (B, 1, H, W)
            loss = masked_reconstruction_loss(target, reconstruction, mask, self.config)
        output = FlaxMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if flags.return_dict else output.to_tuple()


def masked_reconstruction_loss(pixel_values, reconstruction, mask, config: ViTConfig):
    """Mean absolute error over the masked pixels: images (B, C, H, W), mask (B, 1, H, W)."""
    exact = jnp.promote_types(reconstruction.dtype, jnp.float32)
    mask = mask.astype(exact)
    error = jnp.abs(pixel_values.astype(exact) - reconstruction.astype(exact)) * mask
    return jnp.sum(error) / (jnp.sum(mask) + 1e-5) / config.num_channels
