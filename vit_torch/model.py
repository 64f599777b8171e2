"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), in PyTorch.

Read top to bottom: embeddings, attention, MLP, block, encoder, heads. `vit_flax/model.py` is the
same text in Flax. Modules take images as (B, C, H, W); parameter names and the order of
operations are those of Transformers 4.57.6 (`models/vit/modeling_vit.py`).

DeiT, BEiT and DINOv2 are the same network with other fields of the config.

B batch, C channels, H W pixels, P patch side, N patches, T tokens in front of them (the class
token), S = T + N tokens, D width, L layers, A heads, I MLP width, K labels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
from vit_torch.arguments import check_tensors, has_values
from vit_torch.attention import attention
from vit_torch.layers import add_parameter, convolution, dense, layer_norm
from vit_torch.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
)
from vit_torch.parts.attention_pool import ViTAttentionPooler
from vit_torch.parts.differential import ViTDifferentialAttention
from vit_torch.parts.mbconv import ViTMBConvStem, padded_convolution
from vit_torch.parts.part import ViTPart, activation, options
from vit_torch.parts.relative import ViTRelativePositionMLP
from vit_torch.parts.resnetd import ViTResNetDStem
from vit_torch.parts.rotary import Rotation, rotate, rotation
from vit_torch.parts.stems import ViTConvolutionStem, ViTStem

STEMS: dict[str, type[ViTPart]] = {
    "resnetv2": ViTStem,
    "mbconv": ViTMBConvStem,
    "convolutions": ViTConvolutionStem,
    "resnetd": ViTResNetDStem,
}
"""`stem_type` -> the network before the patches."""


class ViTPatchEmbeddings(ViTPart):
    """Cuts the image into patches and projects each to width D.

    Attributes:
        image_size, patch_size: (height, width).
        num_patches: N, for an image of `image_size`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.patch_size = (
            self.config.image_height_width,
            self.config.patch_height_width,
        )
        self.num_channels, self.num_patches = self.config.num_channels, self.config.num_patches
        inputs, D = self.config.stem_channels, self.config.hidden_size
        if self.config.stem_type == "mbconv":  # its patches overlap
            self.projection = padded_convolution(self, inputs, D, stride=2)
        else:
            size, use_bias = self.config.patch_projection_size, self.config.use_patch_bias
            self.projection = convolution(self, inputs, D, size, use_bias=use_bias)

    def forward(self, pixel_values):
        embeddings = self.projection(pixel_values)  # (B, D, H/P, W/P); with a stem, of its output
        return embeddings.flatten(2).transpose(1, 2)  # (B, N, D)


class ViTEmbeddings(ViTPart):
    """Patch embeddings (masked ones replaced), the tokens in front of them, position embeddings."""

    def __init__(self, use_mask_token: bool = False, **kwargs):
        super().__init__(**kwargs)
        config, D = self.config, self.config.hidden_size
        self.use_mask_token = use_mask_token
        if config.use_cls_token:
            add_parameter(self, "cls_token", (1, 1, D), "normal")
        if config.use_distillation_token:
            add_parameter(self, "distillation_token", (1, 1, D), "normal")
        if config.num_register_tokens:
            add_parameter(self, "register_tokens", (1, config.num_register_tokens, D), 0.0)
        if self.use_mask_token:
            add_parameter(self, "mask_token", (1, 1, D), 0.0)
        else:
            self.mask_token = None
        if config.use_absolute_position_embeddings:
            positions = config.num_prefix_positions + config.num_patches
            add_parameter(self, "position_embeddings", (1, positions, D), "normal")
        if config.stem_type is not None:
            self.stem = STEMS[config.stem_type](**options(self))
        self.patch_embeddings = ViTPatchEmbeddings(**options(self))
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    @property
    def tokens(self) -> list[torch.Tensor]:
        """The tokens in front of the patches, (1, 1, D) or (1, R, D)."""
        names = ("cls_token", "distillation_token", "register_tokens")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def forward(
        self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding: Interpolate = None
    ):
        check_rank(pixel_values, "(batch, channels, height, width)")
        B, C, H, W = pixel_values.shape
        grid = check_image(C, H, W, self.config, interpolate=interpolate_pos_encoding)

        dtype = self.patch_embeddings.projection.weight.dtype
        pixel_values = pixel_values.to(dtype)
        if self.config.stem_type is not None:
            P = self.config.patch_height_width
            pixel_values = self.stem(pixel_values[:, :, : grid[0] * P[0], : grid[1] * P[1]])
        embeddings = self.patch_embeddings(pixel_values)  # (B, N, D)
        if bool_masked_pos is not None:
            if not self.use_mask_token:
                raise InputError(
                    "`bool_masked_pos` needs a mask token; build the model with "
                    "`use_mask_token=True`."
                )
            check_mask(bool_masked_pos.shape, B, grid[0] * grid[1])
            mask = bool_masked_pos[:, :, None].to(dtype)  # (B, N, 1)
            embeddings = embeddings * (1.0 - mask) + self.mask_token * mask

        D, k = self.config.hidden_size, self.config.num_prefix_positions
        prefix = [token.expand(B, token.shape[1], D) for token in self.tokens]
        front = torch.cat((*prefix, embeddings[:, :0]), dim=1)  # (B, T, D)
        embeddings = torch.cat((front[:, :k], embeddings), dim=1)  # (B, k + N, D)
        if self.config.use_absolute_position_embeddings:
            embeddings = embeddings + self.positions(grid)
        if k < self.config.num_prefix_tokens:  # tokens without positions come in after them
            parts = (embeddings[:, :k], front[:, k:], embeddings[:, k:])
            embeddings = torch.cat(parts, dim=1)  # (B, S, D)
        return self.dropout(embeddings)

    def positions(self, grid: tuple[int, int]):
        """Position embeddings (1, k + N, D) for a grid (rows, columns) of patches; k tokens in
        front of them have one."""
        positions: Any = self.position_embeddings
        if grid == self.config.grid_size:
            return positions
        dtype = positions.dtype
        exact = torch.promote_types(dtype, torch.float32)
        rows, columns = resize_matrices(self.config.position_resize, self.config.grid_size, grid)
        positions = positions.to(exact)
        k = self.config.num_prefix_positions
        table = positions[0, k:].reshape(*self.config.grid_size, self.config.hidden_size)
        table = torch.einsum(
            "Hh,Ww,hwd->HWd",
            torch.tensor(rows, dtype=exact, device=positions.device),
            torch.tensor(columns, dtype=exact, device=positions.device),
            table,
        )
        table = table.reshape(1, grid[0] * grid[1], self.config.hidden_size)  # (1, N, D)
        return torch.cat((positions[:, :k], table), dim=1).to(dtype)


class ViTRelativePositionBias(ViTPart):
    """A learned bias on the scores of each head for each offset between two tokens."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        shape = (relative_distances(self.config.grid_size), self.config.num_attention_heads)
        add_parameter(self, "relative_position_bias_table", shape, 0.0)

    def forward(self, grid: tuple[int, int]):
        table: Any = self.relative_position_bias_table
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        if grid != self.config.grid_size:
            (h, w), (H, W), A = self.config.grid_size, grid, self.config.num_attention_heads
            source, target = (2 * h - 1, 2 * w - 1), (2 * H - 1, 2 * W - 1)
            rows, columns = resize_matrices("bilinear", source, target)
            offsets = torch.einsum(
                "Hh,Ww,hwa->HWa",
                torch.tensor(rows, dtype=table.dtype, device=table.device),
                torch.tensor(columns, dtype=table.dtype, device=table.device),
                table[:-3].reshape(*source, A),
            )
            table = torch.cat((offsets.reshape(target[0] * target[1], A), table[-3:]))
        index = torch.tensor(relative_position_index(grid), device=table.device)
        bias = table[index]  # (S, S, A)
        return bias.permute(2, 0, 1)[None]  # (1, A, S, S)


def relative_positions(part: ViTPart) -> ViTPart:
    """Where the biases of offsets come from, by `relative_position_type`."""
    by_mlp = part.config.relative_position_type == "mlp"
    cls = ViTRelativePositionMLP if by_mlp else ViTRelativePositionBias
    return cls(**options(part))


class ViTSelfAttention(ViTPart):
    """Query, key and value of every head, and their attention.

    Attributes:
        num_attention_heads: A.
        attention_head_size: width D/A of a head.
        all_head_size: D.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        D = self.all_head_size = self.config.hidden_size
        self.num_attention_heads = self.config.num_attention_heads
        self.attention_head_size = D // self.num_attention_heads
        self.query = dense(self, D, D, use_bias=self.config.has_query_bias)
        self.key = dense(self, D, D, use_bias=self.config.has_key_bias)
        self.value = dense(self, D, D, use_bias=self.config.has_value_bias)
        if self.config.use_qk_norm:
            self.query_norm = layer_norm(self, self.attention_head_size)
            self.key_norm = layer_norm(self, self.attention_head_size)
        self.dropout = nn.Dropout(self.config.attention_probs_dropout_prob)
        if self.config.use_relative_position_bias:
            self.relative_position_bias = relative_positions(self)
        if self.config.attention_type == "differential":
            self.differential = ViTDifferentialAttention(**options(self))

    def forward(
        self,
        hidden_states,
        head_mask=None,
        bias=None,
        output_attentions: bool = False,
        grid: tuple[int, int] | None = None,
        rotation=None,
    ):
        """The context (B, S, D), and the probabilities (B, A, S, S) or None: see `attention`."""
        B, S, D = hidden_states.shape
        if self.config.use_relative_position_bias:
            own = self.relative_position_bias(grid or self.config.grid_size)
            bias = own if bias is None else bias + own  # (1, A, S, S)
        A = self.config.num_attention_heads
        query = self.query(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        key = self.key(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        value = self.value(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        if self.config.use_qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query = rotate(query, rotation, self.config.rope_rotate_half)
            key = rotate(key, rotation, self.config.rope_rotate_half)
        differs = self.config.attention_type == "differential"
        attend = self.differential if differs else attention
        context, probabilities = attend(
            query,
            key,
            value,
            bias=bias,
            head_mask=head_mask,
            dropout=self.dropout if self.training and self.dropout.p > 0.0 else None,
            output_attentions=output_attentions,
            implementation=self.attn_implementation,
        )
        return context.reshape(B, S, D), probabilities  # (B, S, D), (B, A, S, S)


class ViTSelfOutput(ViTPart):
    """Mixes the heads."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.config.use_attention_norm:
            self.layernorm = layer_norm(self)
        D = self.config.hidden_size
        self.dense = dense(self, D, D, use_bias=self.config.proj_bias)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def forward(self, hidden_states):
        if self.config.use_attention_norm:
            hidden_states = self.layernorm(hidden_states)
        hidden_states = self.dense(hidden_states)
        return self.dropout(hidden_states)


def with_probabilities(hidden_states, probabilities, output_attentions: bool, part: ViTPart):
    """What a block and its attention return: hidden states (B, S, D), with probabilities a pair.

    Without them too BEiT's return a tuple in Transformers 4.57.6, and hooks expect what they do.
    """
    if output_attentions:
        return hidden_states, probabilities
    return (hidden_states,) if part.config.base_family == "beit" else hidden_states


def without_tuple(output):
    """Undo `with_probabilities`: hidden states, and the probabilities or None."""
    if not isinstance(output, tuple):
        return output, None
    hidden_states, *probabilities = output
    return hidden_states, probabilities[0] if probabilities else None


class ViTAttention(ViTPart):
    """Self-attention and the projection after it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = ViTSelfAttention(**options(self))
        self.output = ViTSelfOutput(**options(self))

    def forward(
        self,
        hidden_states,
        head_mask=None,
        bias=None,
        output_attentions: bool = False,
        grid: tuple[int, int] | None = None,
        rotation=None,
    ):
        """As `ViTLayer`."""
        context, probabilities = self.attention(
            hidden_states, head_mask, bias, output_attentions, grid, rotation
        )
        return with_probabilities(self.output(context), probabilities, output_attentions, self)


class ViTIntermediate(ViTPart):
    """First half of the MLP."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        width = self.config.intermediate_size
        features = 2 * width if self.config.use_swiglu_ffn else width
        if self.config.use_mlp_input_norm:
            self.layernorm = layer_norm(self)
        self.dense = dense(self, self.config.hidden_size, features, use_bias=self.config.mlp_bias)

    def forward(self, hidden_states):
        if self.config.use_mlp_input_norm:
            hidden_states = self.layernorm(hidden_states)
        hidden_states = self.dense(hidden_states)  # (B, S, I), or (B, S, 2 I)
        if self.config.use_swiglu_ffn:
            gate, hidden_states = hidden_states.chunk(2, dim=-1)
            return activation(self.config.gate_act)(gate) * hidden_states  # (B, S, I)
        return activation(self.config.hidden_act)(hidden_states)


class ViTOutput(ViTPart):
    """Second half of the MLP."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.config.use_mlp_norm:
            self.layernorm = layer_norm(self, self.config.intermediate_size)
        width, D = self.config.intermediate_size, self.config.hidden_size
        self.dense = dense(self, width, D, use_bias=self.config.mlp_bias)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def forward(self, hidden_states):
        if self.config.use_mlp_norm:
            hidden_states = self.layernorm(hidden_states)
        hidden_states = self.dense(hidden_states)  # (B, S, D)
        return self.dropout(hidden_states)


class ViTDropPath(nn.Module):
    """Stochastic depth: in training, zero for a share `p` of the images; the rest is scaled up to
    keep the mean."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states):
        if not self.training or self.p == 0.0:
            return hidden_states
        B, *rest = hidden_states.shape
        return hidden_states * F.dropout(hidden_states.new_ones(B, *(1 for _ in rest)), self.p)


class ViTBranch(ViTPart):
    """What a block adds to its input: an attention and an MLP, with the norm and the factors of
    each. `block_type` says where the norms are.

    Attributes:
        drop_path_rate: how often, in training, an image skips the attention or the MLP.
    """

    def __init__(self, drop_path_rate: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.attention = ViTAttention(**options(self))
        self.intermediate = ViTIntermediate(**options(self))
        self.output = ViTOutput(**options(self))
        parallel = self.config.block_type == "parallel"
        self.layernorm_before = layer_norm(self)
        if not parallel:
            self.layernorm_after = layer_norm(self)
        self.drop_path = ViTDropPath(drop_path_rate)
        if self.config.has_layer_scale:
            D, value = self.config.hidden_size, self.config.layer_scale_init_value
            add_parameter(self, "lambda_1", (D,), value)
            if self.config.has_mlp_layer_scale:
                add_parameter(self, "lambda_2", (D,), value)

    def attend(self, hidden_states, **inputs):
        """What attention adds, (B, S, D), and the probabilities (B, A, S, S) or None."""
        post_norm = self.config.block_type == "post_norm"
        normed = hidden_states if post_norm else self.layernorm_before(hidden_states)
        output, probabilities = without_tuple(self.attention(normed, **inputs))
        if post_norm:
            output = self.layernorm_before(output)
        if self.config.has_layer_scale:
            output = output * self.lambda_1
        return self.drop_path(output), probabilities

    def transform(self, hidden_states):
        """What the MLP adds, (B, S, D)."""
        post_norm = self.config.block_type == "post_norm"
        normed = hidden_states if post_norm else self.layernorm_after(hidden_states)
        output = self.output(self.intermediate(normed))
        if post_norm:
            output = self.layernorm_after(output)
        if self.config.has_mlp_layer_scale:
            output = output * self.lambda_2
        return self.drop_path(output)

    def attend_and_transform(self, hidden_states, **inputs):
        """What attention and MLP add beside each other, (B, S, D), and the probabilities."""
        normed = self.layernorm_before(hidden_states)
        output, probabilities = without_tuple(self.attention(normed, **inputs))
        output = output + self.output(self.intermediate(normed))
        if self.config.has_layer_scale:
            output = output * self.lambda_1
        return self.drop_path(output), probabilities


class ViTBranches(nn.ModuleDict):
    """The branches of a block beside its first, which is the block itself; parameters have the
    names `branch.{j}`, j from 1 on."""

    def __init__(self, part: ViTPart, drop_path_rate: float):
        count = part.config.num_parallel_branches
        super().__init__(
            {str(j): ViTBranch(drop_path_rate, **options(part)) for j in range(1, count)}
        )

    def attend(self, output, hidden_states, **inputs):
        """What the attentions of all branches add; `output` is that of the first, (B, S, D)."""
        branch: Any
        for branch in self.values():
            output = output + branch.attend(hidden_states, **inputs)[0]
        return output

    def transform(self, output, hidden_states):
        """What the MLPs of all branches add; `output` is that of the first, (B, S, D)."""
        branch: Any
        for branch in self.values():
            output = output + branch.transform(hidden_states)
        return output


class ViTLayer(ViTBranch):
    """One block: attention and MLP, each with a residual, or one residual for both."""

    def __init__(self, drop_path_rate: float = 0.0, **kwargs):
        super().__init__(drop_path_rate, **kwargs)
        if self.config.num_parallel_branches > 1:
            self.branch = ViTBranches(self, drop_path_rate)

    def forward(
        self,
        hidden_states,
        head_mask=None,
        bias=None,
        output_attentions: bool = False,
        grid: tuple[int, int] | None = None,
        rotation=None,
    ):
        """Hidden states (B, S, D); with `output_attentions`, a pair of these and the probabilities,
        of several branches those of the first; of BEiT a tuple in any case.

        Args:
            hidden_states: (B, S, D).
            head_mask: broadcasts against (B, A, S, S).
            bias: added to the attention scores, such as the one that all of BEiT's blocks share.
            output_attentions: return the attention probabilities (B, A, S, S) too.
            grid: rows and columns of patches, for BEiT's bias; None means those of the config.
            rotation: by what queries and keys are rotated, see `vit_torch.parts.rotary`.
        """
        parallel, branches = self.config.block_type == "parallel", self.config.num_parallel_branches
        inputs = {"head_mask": head_mask, "bias": bias, "grid": grid, "rotation": rotation}
        run = self.attend_and_transform if parallel else self.attend
        output, probabilities = run(hidden_states, **inputs, output_attentions=output_attentions)
        if branches > 1:
            output = self.branch.attend(output, hidden_states, **inputs)
        hidden_states = output + hidden_states
        if not parallel:
            output = self.transform(hidden_states)
            if branches > 1:
                output = self.branch.transform(output, hidden_states)
            hidden_states = output + hidden_states
        return with_probabilities(hidden_states, probabilities, output_attentions, self)

    @property
    def norm1(self) -> nn.Module:
        """The norm before attention, under DINOv2's name."""
        return self.layernorm_before

    @property
    def norm2(self) -> nn.Module:
        """The norm before the MLP, under DINOv2's name."""
        return self.layernorm_after


class ViTEncoder(ViTPart):
    """The stack of blocks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = nn.ModuleList(
            ViTLayer(**options(self), drop_path_rate=rate) for rate in self.config.drop_path_rates
        )
        for layer, share in zip(self.layer, self.config.differential_shares, strict=True):
            for module in layer.modules():
                if isinstance(module, ViTDifferentialAttention):
                    module.share = share
        if self.config.use_shared_relative_position_bias:
            self.relative_position_bias = relative_positions(self)
        if self.config.rope_type == "mixed":
            L, A = self.config.num_hidden_layers, self.config.num_attention_heads
            shape = (2, L, A, self.config.head_dim // 2)
            add_parameter(self, "rope_frequencies", shape, "frequencies")
        self.gradient_checkpointing = self.config.gradient_checkpointing
        self.gradient_checkpointing_kwargs: dict[str, Any] = {"use_reentrant": False}

    def forward(
        self,
        hidden_states,
        head_mask=None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        grid: tuple[int, int] | None = None,
        bias=None,
    ):
        """`BaseModelOutput` of the last block, before the final norm.

        Args:
            hidden_states: (B, S, D).
            head_mask: (A,) or (L, A), multiplies the attention probabilities.
            output_attentions, output_hidden_states: return those of every block too.
            return_dict: False returns the output's tuple.
            grid: rows and columns of patches, for positions; None means those of the config.
            bias: added to the scores of every block, such as a text's mask; broadcasts against
                (B, A, S, S).
        """
        if head_mask is not None:
            head_mask = spread_head_mask(head_mask, self.config)
        if self.config.use_shared_relative_position_bias:
            bias = self.relative_position_bias(grid or self.config.grid_size)
        turns = self.rotations(grid or self.config.grid_size, hidden_states)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        all_hidden_states, all_attentions = [hidden_states], []
        for i, layer in enumerate(self.layer):
            layer_mask = None if head_mask is None else head_mask[i]
            inputs = (hidden_states, layer_mask, bias, output_attentions, grid, turns[i])
            if recompute:
                hidden_states = checkpoint(layer, *inputs, **self.gradient_checkpointing_kwargs)
            else:
                hidden_states = layer(*inputs)
            if isinstance(hidden_states, tuple):
                hidden_states, *probabilities = hidden_states
                all_attentions += probabilities
            all_hidden_states.append(hidden_states)
        output = BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def rotations(self, grid: tuple[int, int], like: torch.Tensor) -> list[Rotation | None]:
        """By what each block rotates queries and keys, for a grid (rows, columns) of patches; in
        the dtype and on the device of a tensor."""
        L, kind = self.config.num_hidden_layers, self.config.rope_type
        if kind is None:
            return [None] * L
        turn = rotation(self.config, grid, like, getattr(self, "rope_frequencies", None))
        return list(zip(*turn, strict=True)) if kind == "mixed" else [turn] * L


def spread_head_mask(head_mask, config: ViTConfig):
    """(A,) or (L, A) -> (L, 1, A, 1, 1): one factor for each layer and head."""
    check_head_mask(head_mask.shape, config)
    if head_mask.ndim == 5:
        return head_mask
    L, A = config.num_hidden_layers, config.num_attention_heads
    return head_mask.expand(L, A)[:, None, :, None, None]


def mean_of_patches(hidden_states, config: ViTConfig):
    """(B, S, D) -> (B, D): the mean of the tokens that are patches, or as `pool_prefix_tokens` says
    of all."""
    return hidden_states[:, config.first_pooled_token :].mean(dim=1)


class ViTPooler(ViTPart):
    """One vector per image: the class token or the mean of the patches, and then, by `pooler_type`,
    a dense layer with `pooler_act`, a norm, or nothing."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.config.pooler_type == "dense":
            self.dense = dense(self, self.config.hidden_size, self.config.pooler_output_size)
        elif self.config.pooler_type == "norm":
            self.layernorm = layer_norm(self)

    def forward(self, hidden_states):
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


class ViTModule(ViTPart):
    """The base network: embeddings (of CLIP with a norm), encoder, final norm and, if asked for,
    the pooler.

    Attributes:
        add_pooling_layer: whether there is a pooler.
        use_mask_token: whether there is a mask token, for `bool_masked_pos`.
    """

    def __init__(self, add_pooling_layer: bool = True, use_mask_token: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.add_pooling_layer = add_pooling_layer
        self.use_mask_token = use_mask_token or self.config.use_mask_token
        self.embeddings = ViTEmbeddings(**options(self), use_mask_token=self.use_mask_token)
        if self.config.use_pre_norm:
            self.pre_layernorm = layer_norm(self)
        self.encoder = ViTEncoder(**options(self))
        if self.config.has_final_norm:
            self.layernorm = layer_norm(self)
        pooler = ViTAttentionPooler if self.config.pooler_type == "map" else ViTPooler
        has_pooler = add_pooling_layer and self.config.pooler_type is not None
        self.pooler = pooler(**options(self)) if has_pooler else None

    def forward(
        self,
        pixel_values,
        bool_masked_pos=None,
        head_mask=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
    ):
        """Run the network.

        Args:
            pixel_values: (B, C, H, W), cast to the parameters' dtype.
            bool_masked_pos: (B, N), 1 where a patch is replaced by the mask token.
            head_mask: (A,) or (L, A), multiplies the attention probabilities.
            output_attentions, output_hidden_states, return_dict: None means the config's.
            interpolate_pos_encoding: accept other image sizes, resampling the positions; with
                "crop" also sizes that hold no whole number of patches: the last rows and columns
                of pixels are left out.

        Returns:
            `BaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        check_tensors(
            pixel_values=pixel_values, bool_masked_pos=bool_masked_pos, head_mask=head_mask
        )
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        hidden_states = self.embeddings(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )  # (B, S, D)
        if self.config.use_pre_norm:
            hidden_states = self.pre_layernorm(hidden_states)
        P = self.config.patch_height_width
        outputs = self.encoder(
            hidden_states,
            head_mask=head_mask,
            output_attentions=flags.output_attentions,
            output_hidden_states=flags.output_hidden_states,
            grid=(pixel_values.shape[2] // P[0], pixel_values.shape[3] // P[1]),
        )
        last_hidden_state = outputs.last_hidden_state  # (B, S, D)
        if self.config.has_final_norm:
            last_hidden_state = self.layernorm(last_hidden_state)
        pooled = self.pooler(last_hidden_state) if self.pooler is not None else None
        return finish(
            BaseModelOutputWithPooling,
            outputs,
            flags,
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
        )


def add_network(part: ViTPart, **kwargs) -> None:
    """Put the base network into a model with a head, under the name its family gives it."""
    make = getattr(part, "make_network", partial(ViTModule, **options(part)))
    part.add_module(part.config.base_model_prefix, make(**kwargs))


def run_network(part: ViTPart, flags, pixel_values, **inputs):
    """The base network of a model with a head, run with `inputs`; `flags` are the caller's."""
    network = part.get_submodule(part.config.base_model_prefix)
    return network(
        pixel_values,
        output_attentions=flags.output_attentions,
        output_hidden_states=flags.output_hidden_states,
        return_dict=True,
        **inputs,
    )


class ViTForImageClassificationModule(ViTPart):
    """The base network and a linear classifier on the class token, or as `pooling` says."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        config = self.config
        add_network(self, add_pooling_layer=config.classifier_has_pooler or config.keeps_pooler)
        self.classifier = dense(self, self.config.classifier_width, self.config.num_labels)

    def forward(
        self,
        pixel_values,
        head_mask=None,
        labels=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `ViTModel`, and

        Args:
            labels: (B,) class indices (-100 is ignored), (B,) numbers for one label, or (B, K)
                for several labels; then `loss` is in the output. `config.problem_type` decides,
                or, where it is None, the number of labels and the dtype.

        Returns:
            `ImageClassifierOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model; a label is out of range.
        """
        check_tensors(labels=labels)
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        logits = self.classifier(classifier_input(outputs, self.config))  # (B, K)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)
        return finish(ImageClassifierOutput, outputs, flags, loss=loss, logits=logits)


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
    return torch.cat((hidden_states[:, 0], mean), dim=1)


def classification_loss(logits, labels, config: ViTConfig):
    """Mean loss of `logits` (B, K): squared error, cross entropy (label -100 is ignored) or
    binary cross entropy, chosen by `problem_type` or, without one, by the labels' dtype."""
    integer = not labels.dtype.is_floating_point and labels.dtype != torch.bool
    problem_type = resolve_problem_type(config, integer)
    values = labels.cpu().numpy() if integer and has_values(labels) else labels
    check_labels(values, problem_type, logits.shape[0], config.num_labels)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "regression":
        return F.mse_loss(logits, labels.reshape(logits.shape).to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.reshape(-1).long(), ignore_index=-100)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class DeiTForImageClassificationWithTeacherModule(ViTPart):
    """The base network and two classifiers, on the class and the distillation token, whose logits
    are averaged."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        add_network(self, add_pooling_layer=False)
        self.cls_classifier = dense(self, self.config.hidden_size, self.config.num_labels)
        self.distillation_classifier = dense(self, self.config.hidden_size, self.config.num_labels)

    def forward(
        self,
        pixel_values,
        head_mask=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `ViTModel`.

        Returns:
            `DeiTForImageClassificationWithTeacherOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])  # (B, K)
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        return finish(
            DeiTForImageClassificationWithTeacherOutput,
            outputs,
            flags,
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )


class BeitForMaskedImageModelingModule(ViTPart):
    """The base network and a head that predicts a visual token for each patch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        add_network(self, add_pooling_layer=False)
        self.lm_layernorm = layer_norm(self)
        self.lm_head = dense(self, self.config.hidden_size, self.config.vocab_size)

    def forward(
        self,
        pixel_values,
        bool_masked_pos=None,
        head_mask=None,
        labels=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `ViTModel`, and

        Args:
            labels: visual tokens, (B, N), or those of the masked patches alone, one after the
                other; then `loss`, over the masked patches, is in the output.

        Returns:
            `MaskedLMOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        check_tensors(labels=labels)
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        hidden_states = self.lm_layernorm(outputs.last_hidden_state)
        logits = self.lm_head(hidden_states[:, self.config.num_prefix_tokens :])  # (B, N, vocab)
        loss = None
        if labels is not None:
            loss = visual_token_loss(logits, labels, bool_masked_pos)
        return finish(MaskedLMOutput, outputs, flags, loss=loss, logits=logits)


def visual_token_loss(logits, labels, bool_masked_pos):
    """Mean cross entropy of the masked patches: logits (B, N, vocab), labels and mask (B, N), or
    one label for each masked patch."""
    check_token_labels(labels, bool_masked_pos, logits.shape)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = bool_masked_pos != 0
    if labels.ndim == 1:
        return F.cross_entropy(logits[counted], labels.long(), ignore_index=-100)
    labels = torch.where(counted, labels.long(), -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class ViTDecoder(nn.Sequential):
    """A 1 x 1 convolution to the pixels of each token, and a pixel shuffle."""

    def __init__(self, part: ViTPart):
        side, C = part.config.encoder_stride, part.config.num_channels
        super().__init__(
            convolution(part, part.config.hidden_size, side**2 * C, (1, 1)),
            nn.PixelShuffle(side),
        )


class ViTForMaskedImageModelingModule(ViTPart):
    """The base network and a decoder back to pixels (SimMIM, Xie et al. 2022, arXiv:2111.09886)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        add_network(self, add_pooling_layer=False, use_mask_token=True)
        self.decoder = ViTDecoder(self)

    def forward(
        self,
        pixel_values,
        bool_masked_pos=None,
        head_mask=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `ViTModel`. With `bool_masked_pos`, `loss` is in the
        output.

        Returns:
            `MaskedImageModelingOutput` with `reconstruction` (B, C, H, W), or its tuple with
            `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model, `encoder_stride` not the patch side.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        if bool_masked_pos is not None:
            check_stride(self.config, pixel_values.shape[2], pixel_values.shape[3])
        outputs = run_network(
            self,
            flags,
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        B, _, H, W = pixel_values.shape
        P = self.config.patch_height_width
        rows, columns, D = H // P[0], W // P[1], self.config.hidden_size
        # With a distillation token Transformers' decoder still starts at the second token, so what
        # was trained there expects it.
        first = 1 if self.config.use_distillation_token else self.config.num_prefix_tokens
        patches = outputs.last_hidden_state[:, first : first + rows * columns]  # (B, N, D)
        patches = patches.reshape(B, rows, columns, D)
        reconstruction = self.decoder(patches.permute(0, 3, 1, 2))  # (B, C, H, W)
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(B, rows, columns)
            mask = mask.repeat_interleave(P[0], 1).repeat_interleave(P[1], 2)[:, None]
            loss = masked_reconstruction_loss(pixel_values, reconstruction, mask, self.config)
        return finish(
            MaskedImageModelingOutput, outputs, flags, loss=loss, reconstruction=reconstruction
        )


def masked_reconstruction_loss(pixel_values, reconstruction, mask, config: ViTConfig):
    """Mean absolute error over the masked pixels: images (B, C, H, W), mask (B, 1, H, W)."""
    exact = torch.promote_types(reconstruction.dtype, torch.float32)
    mask = mask.to(exact)
    error = (pixel_values.to(exact) - reconstruction.to(exact)).abs() * mask
    return error.sum() / (mask.sum() + 1e-5) / config.num_channels
