"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), in Flax linen.

Read top to bottom: embeddings, attention, MLP, block, encoder, heads. `vit_torch/model.py` is the
same text in PyTorch. Modules take images as (B, H, W, C); parameter names and the order of
operations are those of Transformers 4.57.6 (`models/vit/modeling_flax_vit.py`).

DeiT, BEiT and DINOv2 are the same network with other fields of the config.

B batch, C channels, H W pixels, P patch side, N patches, T tokens in front of them (the class
token), S = T + N tokens, D width, L layers, A heads, I MLP width, K labels.
"""

from __future__ import annotations

from functools import partial
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
from vit_flax.cpu.half import as_operand
from vit_flax.layers import add_parameter, convolution, dense, layer_norm, row_major
from vit_flax.outputs import (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxDeiTForImageClassificationWithTeacherOutput,
    FlaxMaskedImageModelingOutput,
    FlaxMaskedLMOutput,
    FlaxSequenceClassifierOutput,
)
from vit_flax.parts.attention_pool import FlaxViTAttentionPooler
from vit_flax.parts.differential import FlaxViTDifferentialAttention
from vit_flax.parts.mbconv import FlaxViTMBConvStem, padded_convolution
from vit_flax.parts.part import FlaxViTPart, activation, options
from vit_flax.parts.relative import FlaxViTRelativePositionMLP
from vit_flax.parts.resnetd import FlaxViTResNetDStem
from vit_flax.parts.rotary import rotate, rotation
from vit_flax.parts.stems import FlaxViTConvolutionStem, FlaxViTStem
from vit_flax.stacked import make_blocks, scan_blocks

STEMS: dict[str, type[FlaxViTPart]] = {
    "resnetv2": FlaxViTStem,
    "mbconv": FlaxViTMBConvStem,
    "convolutions": FlaxViTConvolutionStem,
    "resnetd": FlaxViTResNetDStem,
}
"""`stem_type` -> the network before the patches."""


class FlaxViTPatchEmbeddings(FlaxViTPart):
    """Cuts the image into patches and projects each to width D."""

    def setup(self):
        D = self.config.hidden_size
        if self.config.stem_type == "mbconv":  # its patches overlap
            self.projection = padded_convolution(self, D, stride=2)
        else:
            size, use_bias = self.config.patch_projection_size, self.config.use_patch_bias
            self.projection = convolution(self, D, size, use_bias=use_bias)

    def __call__(self, pixel_values):
        embeddings = self.projection(pixel_values)  # (B, H/P, W/P, D); with a stem, of its output
        B, rows, columns, D = embeddings.shape
        return embeddings.reshape(B, rows * columns, D)  # (B, N, D)


class FlaxViTEmbeddings(FlaxViTPart):
    """Patch embeddings (masked ones replaced), the tokens in front of them, position embeddings."""

    use_mask_token: bool = False

    def setup(self):
        config, D = self.config, self.config.hidden_size
        if config.use_cls_token:
            add_parameter(self, "cls_token", (1, 1, D), "normal")
        if config.use_distillation_token:
            add_parameter(self, "distillation_token", (1, 1, D), "normal")
        if config.num_register_tokens:
            add_parameter(self, "register_tokens", (1, config.num_register_tokens, D), 0.0)
        if self.use_mask_token:
            add_parameter(self, "mask_token", (1, 1, D), 0.0)
        if config.use_absolute_position_embeddings:
            positions = config.num_prefix_positions + config.num_patches
            add_parameter(self, "position_embeddings", (1, positions, D), "normal")
        if config.stem_type is not None:
            self.stem = STEMS[config.stem_type](**options(self))
        self.patch_embeddings = FlaxViTPatchEmbeddings(**options(self))
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    @property
    def tokens(self) -> list[jax.Array]:
        """The tokens in front of the patches, (1, 1, D) or (1, R, D)."""
        names = ("cls_token", "distillation_token", "register_tokens")
        return [getattr(self, name) for name in names if hasattr(self, name)]

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

        pixel_values = pixel_values.astype(self.array_dtype)
        if self.config.stem_type is not None:
            P = self.config.patch_height_width
            pixel_values = self.stem(pixel_values[:, : grid[0] * P[0], : grid[1] * P[1]])
        embeddings = self.patch_embeddings(pixel_values)  # (B, N, D)
        if bool_masked_pos is not None:
            if not self.use_mask_token:
                raise InputError(
                    "`bool_masked_pos` needs a mask token; build the model with "
                    "`use_mask_token=True`."
                )
            check_mask(bool_masked_pos.shape, B, grid[0] * grid[1])
            mask = bool_masked_pos[:, :, None].astype(self.array_dtype)  # (B, N, 1)
            embeddings = embeddings * (1.0 - mask) + self.mask_token.astype(self.array_dtype) * mask

        D, k = self.config.hidden_size, self.config.num_prefix_positions
        prefix = [
            jnp.broadcast_to(token.astype(self.array_dtype), (B, token.shape[1], D))
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
        positions: Any = self.position_embeddings
        if grid == self.config.grid_size:
            return positions.astype(self.array_dtype)
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
        return jnp.concatenate((positions[:, :k], table), axis=1).astype(self.array_dtype)


class FlaxViTRelativePositionBias(FlaxViTPart):
    """A learned bias on the scores of each head for each offset between two tokens."""

    def setup(self):
        shape = (relative_distances(self.config.grid_size), self.config.num_attention_heads)
        add_parameter(self, "relative_position_bias_table", shape, 0.0)

    def __call__(self, grid: tuple[int, int]):
        table: Any = self.relative_position_bias_table
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
        index = relative_position_index(grid)
        bias = table[index]  # (S, S, A)
        return bias.transpose(2, 0, 1)[None]  # (1, A, S, S)


def relative_positions(part: FlaxViTPart) -> FlaxViTPart:
    """Where the biases of offsets come from, by `relative_position_type`."""
    by_mlp = part.config.relative_position_type == "mlp"
    cls = FlaxViTRelativePositionMLP if by_mlp else FlaxViTRelativePositionBias
    return cls(**options(part))


class FlaxViTSelfAttention(FlaxViTPart):
    """Query, key and value of every head, and their attention; F tokens in front attend."""

    def setup(self):
        D = self.config.hidden_size
        self.query = dense(self, D, use_bias=self.config.has_query_bias)
        self.key = dense(self, D, use_bias=self.config.has_key_bias)
        self.value = dense(self, D, use_bias=self.config.has_value_bias)
        if self.config.use_qk_norm:
            self.query_norm = layer_norm(self)
            self.key_norm = layer_norm(self)
        self.dropout = nn.Dropout(self.config.attention_probs_dropout_prob)
        if self.config.use_relative_position_bias:
            self.relative_position_bias = relative_positions(self)
        if self.config.attention_type == "differential":
            self.differential = FlaxViTDifferentialAttention(**options(self))

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        *,
        head_mask=None,
        bias=None,
        grid: tuple[int, int] | None = None,
        rotation=None,
        share=None,
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
        if self.config.use_qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query = rotate(query, rotation, self.config.rope_rotate_half)
            key = rotate(key, rotation, self.config.rope_rotate_half)
        query, key, value = (as_operand(x, self.dtype) for x in (query, key, value))
        attend = attention
        if self.config.attention_type == "differential":
            attend = partial(self.differential, share=share)
        context, probabilities = attend(
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
        if self.config.use_attention_norm:
            self.layernorm = layer_norm(self)
        self.dense = dense(self, self.config.hidden_size, use_bias=self.config.proj_bias)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(self, hidden_states, deterministic: bool = True):
        if self.config.use_attention_norm:
            hidden_states = self.layernorm(hidden_states)
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
        rotation=None,
        share=None,
    ):
        """(B, F, D), and the probabilities (B, A, F, S) or None."""
        context, probabilities = self.attention(
            hidden_states,
            deterministic,
            output_attentions,
            head_mask=head_mask,
            bias=bias,
            grid=grid,
            rotation=rotation,
            share=share,
        )
        return self.output(context, deterministic), probabilities


class FlaxViTIntermediate(FlaxViTPart):
    """First half of the MLP."""

    def setup(self):
        width = self.config.intermediate_size
        features = 2 * width if self.config.use_swiglu_ffn else width
        if self.config.use_mlp_input_norm:
            self.layernorm = layer_norm(self)
        self.dense = dense(self, features, use_bias=self.config.mlp_bias)

    def __call__(self, hidden_states):
        if self.config.use_mlp_input_norm:
            hidden_states = self.layernorm(hidden_states)
        hidden_states = self.dense(hidden_states)  # (B, S, I), or (B, S, 2 I)
        if self.config.use_swiglu_ffn:
            gate, hidden_states = jnp.split(hidden_states, 2, axis=-1)
            return row_major(activation(self.config.gate_act)(gate) * hidden_states)  # (B, S, I)
        return row_major(activation(self.config.hidden_act)(hidden_states))


class FlaxViTOutput(FlaxViTPart):
    """Second half of the MLP."""

    def setup(self):
        if self.config.use_mlp_norm:
            self.layernorm = layer_norm(self)
        self.dense = dense(self, self.config.hidden_size, use_bias=self.config.mlp_bias)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(self, hidden_states, deterministic: bool = True):
        if self.config.use_mlp_norm:
            hidden_states = self.layernorm(hidden_states)
        hidden_states = self.dense(hidden_states)  # (B, S, D)
        return self.dropout(hidden_states, deterministic=deterministic)


class FlaxViTDropPath(nn.Module):
    """Stochastic depth: in training, zero for a share `rate` of the images; the rest is scaled up
    to keep the mean."""

    def __call__(self, hidden_states, rate, deterministic: bool):
        if deterministic or rate is None:
            return hidden_states
        B, *rest = hidden_states.shape
        keep = 1.0 - rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (B, *(1 for _ in rest)))
        return jnp.where(kept, hidden_states / jnp.asarray(keep, hidden_states.dtype), 0.0)


class FlaxViTBranch(FlaxViTPart):
    """What a block adds to its input: an attention and an MLP, with the norm and the factors of
    each. `block_type` says where the norms are."""

    def setup(self):
        self.attention = FlaxViTAttention(**options(self))
        self.intermediate = FlaxViTIntermediate(**options(self))
        self.output = FlaxViTOutput(**options(self))
        parallel = self.config.block_type == "parallel"
        self.layernorm_before = layer_norm(self)
        if not parallel:
            self.layernorm_after = layer_norm(self)
        self.drop_path = FlaxViTDropPath()
        if self.config.has_layer_scale:
            D, value = self.config.hidden_size, self.config.layer_scale_init_value
            add_parameter(self, "lambda_1", (D,), value)
            if self.config.has_mlp_layer_scale:
                add_parameter(self, "lambda_2", (D,), value)

    def attend(
        self, hidden_states, deterministic: bool, output_attentions: bool, rate=None, **inputs
    ):
        """What attention adds, (B, F, D), and the probabilities (B, A, F, S) or None."""
        post_norm = self.config.block_type == "post_norm"
        normed = hidden_states if post_norm else self.layernorm_before(hidden_states)
        output, probabilities = self.attention(normed, deterministic, output_attentions, **inputs)
        if post_norm:
            output = self.layernorm_before(output)
        if self.config.has_layer_scale:
            output = output * self.lambda_1.astype(self.array_dtype)
        return self.drop_path(output, rate, deterministic), probabilities

    def transform(self, hidden_states, deterministic: bool, rate=None):
        """What the MLP adds, (B, F, D)."""
        post_norm = self.config.block_type == "post_norm"
        normed = hidden_states if post_norm else self.layernorm_after(hidden_states)
        output = self.output(self.intermediate(normed), deterministic)
        if post_norm:
            output = self.layernorm_after(output)
        if self.config.has_mlp_layer_scale:
            output = output * self.lambda_2.astype(self.array_dtype)
        return self.drop_path(output, rate, deterministic)

    def attend_and_transform(
        self, hidden_states, deterministic: bool, output_attentions: bool, rate=None, **inputs
    ):
        """What attention and MLP add beside each other, (B, F, D), and the probabilities."""
        normed = self.layernorm_before(hidden_states)
        output, probabilities = self.attention(normed, deterministic, output_attentions, **inputs)
        normed = normed[:, : self.front_tokens]
        output = output + self.output(self.intermediate(normed), deterministic)
        if self.config.has_layer_scale:
            output = output * self.lambda_1.astype(self.array_dtype)
        return self.drop_path(output, rate, deterministic), probabilities


class FlaxViTBranches(FlaxViTPart):
    """The branches of a block beside its first, which is the block itself; parameters have the
    path `branch/{j}`, j from 1 on."""

    def setup(self):
        count = self.config.num_parallel_branches
        self.branches = [FlaxViTBranch(**options(self), name=str(j)) for j in range(1, count)]

    def attend(self, output, hidden_states, deterministic: bool, rate=None, **inputs):
        """What the attentions of all branches add; `output` is that of the first, (B, F, D)."""
        for branch in self.branches:
            output = output + branch.attend(hidden_states, deterministic, False, rate, **inputs)[0]
        return output

    def transform(self, output, hidden_states, deterministic: bool, rate=None):
        """What the MLPs of all branches add; `output` is that of the first, (B, F, D)."""
        for branch in self.branches:
            output = output + branch.transform(hidden_states, deterministic, rate)
        return output


class FlaxViTLayer(FlaxViTBranch):
    """One block: attention and MLP, each with a residual, or one residual for both. With
    `front_tokens`, only those are computed; the others are only attended to."""

    def setup(self):
        super().setup()
        if self.config.num_parallel_branches > 1:
            self.branch = FlaxViTBranches(**options(self))

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        head_mask=None,
        bias=None,
        drop_path_rate=None,
        grid: tuple[int, int] | None = None,
        rotation=None,
        share=None,
    ):
        """(B, S, D), and the attention probabilities (B, A, S, S), None unless asked for; of
        several branches those of the first.

        Args:
            hidden_states: (B, S, D).
            deterministic: no dropout.
            head_mask: broadcasts against (B, A, S, S).
            bias: added to the attention scores, such as the one that all of BEiT's blocks share.
            output_attentions: return the attention probabilities (B, A, S, S) too.
            drop_path_rate: how often, in training, an image skips a branch; None means never.
            grid: rows and columns of patches, for BEiT's bias; None means those of the config.
            rotation: by what queries and keys are rotated, see `vit_flax.parts.rotary`.
            share: see `vit_flax.parts.differential`.
        """
        parallel, branches = self.config.block_type == "parallel", self.config.num_parallel_branches
        inputs = {"head_mask": head_mask, "bias": bias, "grid": grid}
        inputs |= {"rotation": rotation, "share": share}
        rate, flags = drop_path_rate, (deterministic, output_attentions)
        run = self.attend_and_transform if parallel else self.attend
        output, probabilities = run(hidden_states, *flags, rate, **inputs)
        if branches > 1:
            output = self.branch.attend(output, hidden_states, deterministic, rate, **inputs)
        hidden_states = output + hidden_states[:, : self.front_tokens]  # (B, F, D)
        if not parallel:
            output = self.transform(hidden_states, deterministic, rate)
            if branches > 1:
                output = self.branch.transform(output, hidden_states, deterministic, rate)
            hidden_states = output + hidden_states
        return hidden_states, probabilities


class FlaxViTLayerCollection(FlaxViTPart):
    """The L blocks, as PyTorch's `ModuleList`: parameters have the path `layer/{i}`, or, with
    `scan_layers`, `layer/stacked` and an axis of L in front."""

    def setup(self):
        self.layers = make_blocks(FlaxViTLayer, options(self))

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        *,
        head_mask=None,
        bias=None,
        grid: tuple[int, int] | None = None,
        rotation=None,
    ):
        """`FlaxBaseModelOutput` of the last block, or its tuple with `return_dict=False`;
        `head_mask` is (L, 1, A, 1, 1) or None, `rotation` as `vit_flax.parts.rotary` has it."""
        mixed = self.config.rope_type == "mixed"

        def run(layer, hidden_states, own, rate):
            layer_mask, turn, share = own
            inputs = (hidden_states, deterministic, output_attentions, layer_mask, bias, rate, grid)
            return layer(*inputs, turn if mixed else rotation, share)

        shares = None
        if self.config.attention_type == "differential":
            exact = jnp.promote_types(self.array_dtype, jnp.float32)
            shares = jnp.asarray(self.config.differential_shares, exact)
        rates = self.config.drop_path_rates
        owned = (head_mask, rotation if mixed else None, shares)
        if self.scan_layers and self.layers:
            flags = (output_attentions, output_hidden_states)
            output = scan_blocks(run, self.layers[0], hidden_states, owned, rates, *flags)
            return output if return_dict else output.to_tuple()
        all_hidden_states, all_attentions = [hidden_states], []
        for i, layer in enumerate(self.layers):
            own = jax.tree.map(lambda array, i=i: array[i], owned)
            hidden_states, probabilities = run(layer, hidden_states, own, rates[i] or None)
            all_hidden_states.append(hidden_states)
            all_attentions.append(probabilities)
        output = FlaxBaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class FlaxViTEncoder(FlaxViTPart):
    """The stack of blocks."""

    def setup(self):
        self.layer = FlaxViTLayerCollection(**options(self))
        if self.config.use_shared_relative_position_bias:
            self.relative_position_bias = relative_positions(self)
        if self.config.rope_type == "mixed":
            L, A = self.config.num_hidden_layers, self.config.num_attention_heads
            shape = (2, L, A, self.config.head_dim // 2)
            add_parameter(self, "rope_frequencies", shape, "frequencies")

    def __call__(
        self,
        hidden_states,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        *,
        head_mask=None,
        bias=None,
        grid: tuple[int, int] | None = None,
    ):
        """`FlaxBaseModelOutput` of the last block, before the final norm.

        Args:
            hidden_states: (B, S, D).
            deterministic: no dropout.
            head_mask: (A,) or (L, A), multiplies the attention probabilities.
            output_attentions, output_hidden_states: return those of every block too.
            return_dict: False returns the output's tuple.
            bias: added to the scores of every block, such as a text's mask; broadcasts against
                (B, A, S, S).
            grid: rows and columns of patches, for positions; None means those of the config.
        """
        if head_mask is not None:
            head_mask = spread_head_mask(head_mask, self.config)
        if self.config.use_shared_relative_position_bias:
            bias = self.relative_position_bias(grid or self.config.grid_size)
        turn = None
        if self.config.rope_type is not None:
            learned = getattr(self, "rope_frequencies", None)
            turn = rotation(self.config, grid or self.config.grid_size, self.array_dtype, learned)
        return self.layer(
            hidden_states,
            deterministic,
            output_attentions,
            output_hidden_states,
            return_dict,
            head_mask=head_mask,
            bias=bias,
            grid=grid,
            rotation=turn,
        )


def spread_head_mask(head_mask, config: ViTConfig):
    """(A,) or (L, A) -> (L, 1, A, 1, 1): one factor for each layer and head."""
    check_head_mask(head_mask.shape, config)
    if head_mask.ndim == 5:
        return head_mask
    L, A = config.num_hidden_layers, config.num_attention_heads
    return jnp.broadcast_to(head_mask, (L, A))[:, None, :, None, None]


def mean_of_patches(hidden_states, config: ViTConfig):
    """(B, S, D) -> (B, D): the mean of the tokens that are patches, or as `pool_prefix_tokens` says
    of all."""
    if hidden_states.shape[1] <= config.num_prefix_tokens:
        raise InputError("the mean of the patches needs all tokens: `front_tokens` must be None.")
    return jnp.mean(hidden_states[:, config.first_pooled_token :], axis=1)


class FlaxViTPooler(FlaxViTPart):
    """One vector per image: the class token or the mean of the patches, and then, by `pooler_type`,
    a dense layer with `pooler_act`, a norm, or nothing."""

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


def finish(output_class, outputs, flags, **results):
    """An output with `results` and the hidden states and attentions of `outputs`; its tuple where
    `flags` ask for that."""
    output = output_class(
        **results, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )
    return output if flags.return_dict else output.to_tuple()


class FlaxViTModule(FlaxViTPart):
    """The base network: embeddings (of CLIP with a norm), encoder, final norm and, if asked for,
    the pooler.

    Attributes:
        add_pooling_layer: whether there is a pooler.
        use_mask_token: whether there is a mask token, for `bool_masked_pos`.
    """

    output_class = FlaxBaseModelOutputWithPooling  # no field: the family's own

    add_pooling_layer: bool = True
    use_mask_token: bool = False

    @property
    def has_pooler(self) -> bool:
        """Whether there is a pooler: networks without any have none to add."""
        return self.add_pooling_layer and self.config.pooler_type is not None

    def setup(self):
        use_mask_token = self.use_mask_token or self.config.use_mask_token
        self.embeddings = FlaxViTEmbeddings(**options(self), use_mask_token=use_mask_token)
        if self.config.use_pre_norm:
            self.pre_layernorm = layer_norm(self)
        self.encoder = FlaxViTEncoder(**options(self))
        if self.config.has_final_norm:
            self.layernorm = layer_norm(self)
        if self.has_pooler:
            by_attention = self.config.pooler_type == "map"
            pooler = FlaxViTAttentionPooler if by_attention else FlaxViTPooler
            self.pooler = pooler(**options(self))

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
        """Run the network.

        Args:
            pixel_values: (B, H, W, C), cast to `dtype`.
            deterministic: no dropout.
            bool_masked_pos: (B, N), 1 where a patch is replaced by the mask token.
            head_mask: (A,) or (L, A), multiplies the attention probabilities.
            output_attentions, output_hidden_states, return_dict: None means the config's.
            interpolate_pos_encoding: accept other image sizes, resampling the positions; with
                "crop" also sizes that hold no whole number of patches: the last rows and columns
                of pixels are left out.

        Returns:
            `FlaxBaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        hidden_states = self.embeddings(
            pixel_values,
            deterministic,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )  # (B, S, D)
        if self.config.use_pre_norm:
            hidden_states = self.pre_layernorm(hidden_states)
        P = self.config.patch_height_width
        outputs = self.encoder(
            hidden_states,
            deterministic,
            head_mask=head_mask,
            output_attentions=flags.output_attentions,
            output_hidden_states=flags.output_hidden_states,
            grid=(pixel_values.shape[1] // P[0], pixel_values.shape[2] // P[1]),
        )
        last_hidden_state = outputs.last_hidden_state  # (B, S, D)
        if self.config.has_final_norm:
            last_hidden_state = self.layernorm(last_hidden_state)
        pooled = self.pooler(last_hidden_state) if self.has_pooler else None
        return finish(
            self.output_class,
            self.rounded(outputs),
            flags,
            last_hidden_state=self.rounded(last_hidden_state),
            pooler_output=self.rounded(pooled),
        )


def add_network(part: FlaxViTPart, **kwargs) -> None:
    """Put the base network into a model with a head, under the name its family gives it."""
    setattr(part, part.config.base_model_prefix, FlaxViTModule(**options(part), **kwargs))


def run_network(part: FlaxViTPart, flags, pixel_values, deterministic: bool, **inputs):
    """The base network of a model with a head, run with `inputs`; `flags` are the caller's."""
    network = getattr(part, part.config.base_model_prefix)
    return network(
        pixel_values,
        deterministic,
        output_attentions=flags.output_attentions,
        output_hidden_states=flags.output_hidden_states,
        return_dict=True,
        **inputs,
    )


class FlaxViTForImageClassificationModule(FlaxViTPart):
    """The base network and a linear classifier on the class token, or as `pooling` says."""

    def setup(self):
        config = self.config
        add_network(self, add_pooling_layer=config.classifier_has_pooler or config.keeps_pooler)
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
        """Run the network; arguments as `FlaxViTModule`, and

        Args:
            labels: (B,) class indices (-100 is ignored), (B,) numbers for one label, or (B, K)
                for several labels; then `loss` is in the output. `config.problem_type` decides,
                or, where it is None, the number of labels and the dtype.

        Returns:
            `FlaxSequenceClassifierOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model; a label is out of range.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            deterministic,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        logits = self.classifier(classifier_input(outputs, self.config))  # (B, K)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)
        return finish(
            FlaxSequenceClassifierOutput, outputs, flags, loss=loss, logits=self.rounded(logits)
        )


def classifier_input(outputs, config: ViTConfig):
    """Input of the classifier, (B, classifier_width)."""
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
    """Mean loss of `logits` (B, K): squared error, cross entropy (label -100 is ignored) or
    binary cross entropy, chosen by `problem_type` or, without one, by the labels' dtype."""
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    problem_type = resolve_problem_type(config, integer)
    check_labels(labels, problem_type, logits.shape[0], config.num_labels)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if problem_type == "regression":
        return jnp.mean((logits - labels.reshape(logits.shape).astype(logits.dtype)) ** 2)
    if problem_type == "single_label_classification":
        labels = labels.reshape(-1)  # (B,)
        counted = labels != -100
        # Traced labels have no values yet; one out of range makes the loss NaN, not another class.
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
        add_network(self, add_pooling_layer=False)
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
        """Run the network; arguments as `FlaxViTModule`.

        Returns:
            `FlaxDeiTForImageClassificationWithTeacherOutput`, or its tuple with
            `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            deterministic,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])  # (B, K)
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        return finish(
            FlaxDeiTForImageClassificationWithTeacherOutput,
            outputs,
            flags,
            logits=self.rounded((cls_logits + distillation_logits) / 2),
            cls_logits=self.rounded(cls_logits),
            distillation_logits=self.rounded(distillation_logits),
        )


class FlaxBeitForMaskedImageModelingModule(FlaxViTPart):
    """The base network and a head that predicts a visual token for each patch."""

    def setup(self):
        add_network(self, add_pooling_layer=False)
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
        """Run the network; arguments as `FlaxViTModule`, and

        Args:
            labels: visual tokens, (B, N); then `loss`, over the masked patches, is in the output.

        Returns:
            `FlaxMaskedLMOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            deterministic,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        hidden_states = self.lm_layernorm(outputs.last_hidden_state)
        logits = self.lm_head(hidden_states[:, self.config.num_prefix_tokens :])  # (B, N, vocab)
        loss = None
        if labels is not None:
            loss = visual_token_loss(logits, labels, bool_masked_pos)
        logits = self.rounded(logits)
        return finish(FlaxMaskedLMOutput, outputs, flags, loss=loss, logits=logits)


def visual_token_loss(logits, labels, bool_masked_pos):
    """Mean cross entropy of the masked patches: logits (B, N, vocab), labels and mask (B, N)."""
    check_token_labels(labels, bool_masked_pos, logits.shape)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    counted = (bool_masked_pos != 0) & (labels != -100)
    # Traced labels have no values yet; one out of range makes the loss NaN, not another token.
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
        add_network(self, add_pooling_layer=False, use_mask_token=True)
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
        """Run the network; arguments as `FlaxViTModule`. With `bool_masked_pos`, `loss` is in the
        output.

        Returns:
            `FlaxMaskedImageModelingOutput` with `reconstruction` (B, C, H, W), or its tuple with
            `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model, `encoder_stride` not the patch side.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        if bool_masked_pos is not None:
            check_stride(self.config, pixel_values.shape[1], pixel_values.shape[2])
        outputs = run_network(
            self,
            flags,
            pixel_values,
            deterministic,
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
        return finish(
            FlaxMaskedImageModelingOutput,
            outputs,
            flags,
            loss=loss,
            reconstruction=self.rounded(reconstruction),
        )


def masked_reconstruction_loss(pixel_values, reconstruction, mask, config: ViTConfig):
    """Mean absolute error over the masked pixels: images (B, C, H, W), mask (B, 1, H, W)."""
    exact = jnp.promote_types(reconstruction.dtype, jnp.float32)
    mask = mask.astype(exact)
    error = jnp.abs(pixel_values.astype(exact) - reconstruction.astype(exact)) * mask
    return jnp.sum(error) / (jnp.sum(mask) + 1e-5) / config.num_channels
