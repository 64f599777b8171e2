"""The network in numpy, one layer in memory at a time: what a conversion is checked with.

Written from the papers and from what the families publish, apart from both twins, so that it is a
third opinion; needs neither JAX nor torch. float64, so that no processor's rounding is mistaken for
another network; slow, and meant for one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from vit_common.config import ViTConfig
from vit_common.config_fields import STEM_GROUPS, STEM_KERNELS
from vit_common.errors import ConfigError
from vit_common.positions import relative_position_index, rotary_angles, rotary_coordinates
from vit_convert.rules import TensorLike


def _erf(x: np.ndarray) -> np.ndarray:
    """The error function to 3e-7 (Abramowitz and Stegun 1964, 7.1.28)."""
    coefficients = (
        0.0000430638, 0.0002765672, 0.0001520143, 0.0092705272, 0.0422820123, 0.0705230784, 1.0
    )  # fmt: skip
    magnitude = np.abs(x)
    series = np.full_like(magnitude, coefficients[0])
    for coefficient in coefficients[1:]:
        series *= magnitude
        series += coefficient
    with np.errstate(over="ignore"):
        for _ in range(4):  # the 16th power
            series *= series
    return np.copysign(1.0 - 1.0 / series, x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _selu(x: np.ndarray) -> np.ndarray:
    return 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "selu": _selu,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "linear": lambda x: x,
}


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in place: one S x S in memory at a time."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _windows(x: np.ndarray, size: int, stride: int, border: float) -> np.ndarray:
    """(C, H, W) -> (C, H', W', size, size): what a window sees at each of its places, rounded up
    from H / stride; beyond the border a constant, the odd place after the end."""
    pads = [(0, 0)]
    for side in x.shape[1:]:
        total = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, pads, constant_values=border)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return windows[:, ::stride, ::stride]


def _three_by_three(x: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (C, H/2, W/2, 3, 3): windows around every second pixel, zeros beyond."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]


class _Network:
    """The weights by canonical name, read one by one, with what every layer needs."""

    def __init__(self, config: ViTConfig, tensors: Mapping[str, TensorLike]) -> None:
        self.config = config
        self.tensors = tensors

    def weight(self, name: str) -> np.ndarray:
        # In one order of memory whatever file it is from: the same products, term by term.
        return np.ascontiguousarray(self.tensors[name].read(), dtype=np.float64)

    def dense(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        if self.config.norm_type == "rmsnorm":
            squares = np.mean(x**2, axis=-1, keepdims=True)
            return x / np.sqrt(squares + self.config.layer_norm_eps) * self.weight(f"{name}.weight")
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(centred**2, axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + self.config.layer_norm_eps)
        return scaled * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")

    def activation(self, x: np.ndarray, name: object) -> np.ndarray:
        if name not in _ACTIVATIONS:
            raise ConfigError(f"config: the activation {name!r} cannot be run in numpy.")
        return _ACTIVATIONS[str(name)](x)

    # -- the network, top to bottom

    def embeddings(self, image: np.ndarray) -> np.ndarray:
        """(C, H, W) -> (S, D)."""
        config = self.config
        (rows, columns), (p, q) = config.grid_size, config.patch_projection_size
        name = "embeddings.patch_embeddings.projection"
        if config.stem_type == "mbconv":
            image = self.mbconv_stem(image)
            x = self.padded(image, name, 2).reshape(config.hidden_size, -1).T
            return self.with_front(x)
        if config.stem_type == "convolutions":
            for stem, size in zip(("convolution", "convolution2"), STEM_KERNELS, strict=True):
                places = image.shape[1] // size, image.shape[2] // size
                x = self.of_patches(image, places, (size, size), f"embeddings.stem.{stem}")
                image = _ACTIVATIONS["gelu"](x).T.reshape(-1, *places)
        elif config.stem_type == "resnetd":
            image = self.resnetd_stem(image)
        elif config.stem_type is not None:
            image = self.stem(image)
        return self.with_front(self.of_patches(image, (rows, columns), (p, q), name))

    def of_patches(
        self, image: np.ndarray, grid: tuple[int, int], size: tuple[int, int], name: str
    ) -> np.ndarray:
        """(C, H, W) -> (N, out): a kernel over patches that neither overlap nor leave gaps."""
        (rows, columns), (p, q) = grid, size
        patches = image[:, : rows * p, : columns * q].reshape(-1, rows, p, columns, q)
        patches = patches.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        kernel = self.weight(f"{name}.weight")
        x = patches @ kernel.reshape(len(kernel), -1).T
        return x + self.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else x

    def with_front(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (S, D): positions, and the tokens in front."""
        config = self.config
        names = ("cls_token", "distillation_token", "register_tokens")
        found = [f"embeddings.{n}" for n in names if f"embeddings.{n}" in self.tensors]
        front = np.concatenate([x[:0], *(self.weight(name)[0] for name in found)])
        k = config.num_prefix_positions
        if config.use_absolute_position_embeddings:
            positions = self.weight("embeddings.position_embeddings")[0]
            front[:k] += positions[:k]
            x = x + positions[k:]
        return np.concatenate([front, x])

    def convolution(self, x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        """(C, H, W) -> (out, H/stride, W/stride): a standardised kernel at each place."""
        kernel = self.weight(f"{name}.weight")
        rows = kernel.reshape(len(kernel), -1)
        rows = rows - rows.mean(axis=1, keepdims=True)
        if self.config.stem_standardization == "deviation":
            rows = rows / (rows.std(axis=1, keepdims=True) + 1e-5)
        else:
            rows = rows / np.sqrt(rows.var(axis=1, keepdims=True) + 1e-8)
        size = kernel.shape[-1]
        windows = _windows(x, size, stride, 0.0)  # (C, H', W', k, k)
        out = np.einsum("ochw,cyxhw->oyx", rows.reshape(kernel.shape), windows, optimize=True)
        return out

    def group_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """(C, H, W) -> the same."""
        groups = x.reshape(STEM_GROUPS, -1)
        centred = groups - groups.mean(axis=1, keepdims=True)
        deviation = np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + self.config.stem_norm_eps)
        scaled = (centred / deviation).reshape(x.shape)
        weight, bias = (self.weight(f"{name}.{leaf}")[:, None, None] for leaf in ("weight", "bias"))
        return scaled * weight + bias

    def padded(self, x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        """(C, H, W) -> (out, H/stride, W/stride): a kernel at each place, over one pixel of zeros
        beyond the border where it is larger than a pixel."""
        kernel = self.weight(f"{name}.weight")
        size = kernel.shape[-1]
        around = size // 2
        x = np.pad(x, ((0, 0), (around, around), (around, around)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
        windows = windows[:, ::stride, ::stride]
        each = kernel.shape[1] == 1 and len(x) == len(kernel)  # each channel by itself
        rule = "chw,cyxhw->cyx" if each else "ochw,cyxhw->oyx"
        out = np.einsum(rule, kernel[:, 0] if each else kernel, windows, optimize=True)
        return out + self.weight(f"{name}.bias")[:, None, None]

    def channel_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """(C, H, W) -> the same: each pixel by itself."""
        centred = x - x.mean(axis=0)
        scaled = centred / np.sqrt(np.mean(centred**2, axis=0) + self.config.stem_norm_eps)
        weight, bias = (self.weight(f"{name}.{leaf}")[:, None, None] for leaf in ("weight", "bias"))
        return scaled * weight + bias

    def mbconv_stem(self, image: np.ndarray) -> np.ndarray:
        """(C, H, W) -> (stem_channels, H/s, W/s): the inverted bottlenecks of a ViTamin."""
        name, gelu = "embeddings.stem", _ACTIVATIONS["gelu"]
        x = self.channel_norm(self.padded(image, f"{name}.convolution", 2), f"{name}.norm")
        x = self.padded(gelu(x), f"{name}.convolution2")
        for i, depth in enumerate(self.config.stem_depths):
            for j in range(depth):
                block, stride, shortcut = f"{name}.stage{i}.{j}", 2 if j == 0 else 1, x
                if stride == 2:
                    sums = _three_by_three(shortcut).sum(axis=(3, 4))
                    shortcut = sums / _three_by_three(np.ones_like(shortcut)).sum(axis=(3, 4))
                if f"{block}.conv_shortcut.weight" in self.tensors:
                    shortcut = self.padded(shortcut, f"{block}.conv_shortcut")
                x = gelu(self.padded(self.channel_norm(x, f"{block}.norm"), f"{block}.conv1"))
                x = gelu(self.padded(x, f"{block}.conv2", stride))
                x = self.padded(x, f"{block}.conv3") + shortcut
        return self.channel_norm(x, f"{name}.norm_out")

    def resnetd_stem(self, image: np.ndarray) -> np.ndarray:
        """(C, H, W) -> (stem_channels, H/s, W/s): a ResNet-D whose norms are folded."""
        name, x = "embeddings.stem", image
        for number, stride in (("", 2), ("2", 1), ("3", 1)):
            x = np.maximum(self.padded(x, f"{name}.convolution{number}", stride), 0.0)
        x = _three_by_three(x).max(axis=(3, 4))  # zeros beyond the border: none is below
        for i, depth in enumerate(self.config.stem_depths):
            for j in range(depth):
                block, stride, shortcut = f"{name}.stage{i}.{j}", 2 if i > 0 and j == 0 else 1, x
                if stride == 2:
                    C, H, W = x.shape
                    shortcut = x.reshape(C, H // 2, 2, W // 2, 2).mean(axis=(2, 4))
                if j == 0:
                    shortcut = self.padded(shortcut, f"{block}.conv_shortcut")
                for number, step in (("1", 1), ("2", stride)):
                    x = np.maximum(self.padded(x, f"{block}.conv{number}", step), 0.0)
                x = np.maximum(self.padded(x, f"{block}.conv3") + shortcut, 0.0)
        return x

    def stem(self, image: np.ndarray) -> np.ndarray:
        """(C, H, W) -> (stem_channels, H/s, W/s): the ResNet of a hybrid."""
        name = "embeddings.stem"
        x = self.convolution(image, f"{name}.convolution", 2)
        x = np.maximum(self.group_norm(x, f"{name}.norm"), 0.0)
        x = _windows(x, 3, 2, -np.inf).max(axis=(3, 4))
        for i, depth in enumerate(self.config.stem_depths):
            for j in range(depth):
                block, stride = f"{name}.stage{i}.{j}", 2 if i > 0 and j == 0 else 1
                shortcut = x
                if j == 0:
                    shortcut = self.convolution(x, f"{block}.conv_shortcut", stride)
                    shortcut = self.group_norm(shortcut, f"{block}.norm_shortcut")
                for number, step in (("1", 1), ("2", stride), ("3", 1)):
                    x = self.convolution(x, f"{block}.conv{number}", step)
                    x = self.group_norm(x, f"{block}.norm{number}")
                    x = np.maximum(x if number != "3" else x + shortcut, 0.0)
        return x

    def differential(self, query, key, value, name: str, block: int, attends) -> np.ndarray:
        """(S, D), of queries, keys and values (A, S, D/A) of differential attention; `attends`
        gives the map (S, S) of a query, a key and the index of their head."""
        name = f"{name}.differential"
        q1, k1, q2, k2 = (self.weight(f"{name}.lambda_{n}") for n in ("q1", "k1", "q2", "k2"))
        share = 0.8 - 0.6 * math.exp(-0.3 * block)
        full = math.exp(float(q1 @ k1)) - math.exp(float(q2 @ k2)) + share
        heads = []
        for head, v in enumerate(value):
            (q1, q2), (k1, k2) = (np.split(x[head], 2, axis=1) for x in (query, key))
            x = (attends(q1, k1, head) - full * attends(q2, k2, head)) @ v  # (S, D/A)
            x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
            heads.append(x * self.weight(f"{name}.norm.weight") * (1.0 - share))
        return np.concatenate(heads, axis=1)

    def bias_by_mlp(self, name: str) -> np.ndarray:
        """(A, S, S), from the logarithm of the rows and columns between two patches."""
        rows, columns = self.config.grid_size
        places = np.stack(np.divmod(np.arange(rows * columns), columns), -1).astype(np.float64)
        offsets = places[:, None] - places  # (N, N, 2)
        offsets = np.sign(offsets) * np.log(1.0 + np.abs(offsets))
        inner = offsets @ self.weight(f"{name}.in_kernel") + self.weight(f"{name}.in_bias")
        bias = np.maximum(inner, 0.0) @ self.weight(f"{name}.out_kernel")
        bias = bias + self.weight(f"{name}.out_bias")
        T = self.config.num_prefix_tokens
        return np.pad(bias, ((T, 0), (T, 0), (0, 0))).transpose(2, 0, 1)

    def bias(self, name: str) -> np.ndarray:
        """(A, S, S) of a table of relative positions."""
        if self.config.relative_position_type == "mlp":
            return self.bias_by_mlp(f"{name}.relative_position_bias")
        table = self.weight(f"{name}.relative_position_bias.relative_position_bias_table")
        return table[relative_position_index(self.config.grid_size)].transpose(2, 0, 1)

    def rotated(self, x: np.ndarray, block: int) -> np.ndarray:
        """Queries or keys (A, S, D/A) of a block, those of patches turned by their positions."""
        config, T = self.config, self.config.num_prefix_tokens
        if config.rope_type is None:
            return x
        grid = config.rotary_grid(config.grid_size)
        if config.rope_type == "mixed":
            frequencies = self.weight("encoder.rope_frequencies")[:, block]  # (2, A, D/A/2)
            places = rotary_coordinates("mixed", **grid)  # (N, 2)
            angles = np.einsum("nc,cad->and", places, frequencies)
        else:
            angles = rotary_angles(config.rope_type, config.head_dim, config.rope_theta, **grid)
        # A pair of channels is a complex number, and to turn it is to multiply it.
        pairs = x.reshape(*x.shape[:2], 2, -1) if config.rope_rotate_half else None
        if pairs is None:
            pairs = x.reshape(*x.shape[:2], -1, 2).swapaxes(-1, -2)  # (A, S, 2, D/A/2)
        numbers = pairs[:, :, 0] + 1j * pairs[:, :, 1]
        numbers[:, T:] *= np.exp(1j * angles)
        pairs = np.stack([numbers.real, numbers.imag], axis=2)
        return (pairs if config.rope_rotate_half else pairs.swapaxes(-1, -2)).reshape(x.shape)

    def attention(
        self, x: np.ndarray, layer: str, block: int, shared: np.ndarray | None
    ) -> np.ndarray:
        """(S, D) -> (S, D): the attention of that name, in that block."""
        config = self.config
        S, A = len(x), config.num_attention_heads
        name = f"{layer}.attention.attention"
        query, key, value = (
            self.dense(x, f"{name}.{part}").reshape(S, A, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )  # (A, S, D/A)
        if config.use_qk_norm:
            query = self.norm(query, f"{name}.query_norm")
            key = self.norm(key, f"{name}.key_norm")
        query, key = self.rotated(query, block), self.rotated(key, block)
        own = self.bias(name) if config.use_relative_position_bias else None
        biases = [bias for bias in (own, shared) if bias is not None]

        def attends(query: np.ndarray, key: np.ndarray, head: int) -> np.ndarray:
            scores = query @ key.T
            scores /= math.sqrt(query.shape[1])
            for bias in biases:
                scores += bias[head]
            return _softmax(scores)

        if config.attention_type == "differential":
            context = self.differential(query, key, value, name, block, attends)
        else:  # one S x S in memory at a time
            heads = [attends(query[i], key[i], i) @ value[i] for i in range(A)]  # (S, D/A) each
            context = np.concatenate(heads, axis=1)
        if config.use_attention_norm:
            context = self.norm(context, f"{layer}.attention.output.layernorm")
        return self.dense(context, f"{layer}.attention.output.dense")

    def mlp(self, x: np.ndarray, layer: str) -> np.ndarray:
        if self.config.use_mlp_input_norm:
            x = self.norm(x, f"{layer}.intermediate.layernorm")
        x = self.dense(x, f"{layer}.intermediate.dense")
        if self.config.use_swiglu_ffn:
            gate, x = np.split(x, 2, axis=-1)
            x = self.activation(gate, self.config.gate_act) * x
        else:
            x = self.activation(x, self.config.hidden_act)
        if self.config.use_mlp_norm:
            x = self.norm(x, f"{layer}.output.layernorm")
        return self.dense(x, f"{layer}.output.dense")

    def block(self, x: np.ndarray, i: int, shared: np.ndarray | None) -> np.ndarray:
        """(S, D) -> (S, D), by the kind of the block."""
        config, kind = self.config, self.config.block_type
        layer = f"encoder.layer.{i}"
        branches = [f"{layer}.branch.{j}" for j in range(1, config.num_parallel_branches)]
        if kind == "parallel":
            normed = self.norm(x, f"{layer}.layernorm_before")
            both = self.attention(normed, layer, i, shared) + self.mlp(normed, layer)
            return x + self.scaled(both, f"{layer}.lambda_1")
        for norm, scale in (("layernorm_before", "lambda_1"), ("layernorm_after", "lambda_2")):
            attends, added = norm == "layernorm_before", np.zeros_like(x)
            for branch in (layer, *branches):
                y = x if kind == "post_norm" else self.norm(x, f"{branch}.{norm}")
                y = self.attention(y, branch, i, shared) if attends else self.mlp(y, branch)
                if kind == "post_norm":
                    y = self.norm(y, f"{branch}.{norm}")
                added += self.scaled(y, f"{branch}.{scale}")
            x = x + added
        return x

    def scaled(self, x: np.ndarray, name: str) -> np.ndarray:
        has = self.config.has_layer_scale
        if name.endswith("lambda_2"):
            has = self.config.has_mlp_layer_scale
        return x * self.weight(name) if has else x

    def run(self, image: np.ndarray) -> np.ndarray:
        config = self.config
        x = self.embeddings(image)
        if config.use_pre_norm:
            x = self.norm(x, "pre_layernorm")
        shared = self.bias("encoder") if config.use_shared_relative_position_bias else None
        for i in range(config.num_hidden_layers):
            x = self.block(x, i, shared)
        return self.head(self.norm(x, "layernorm") if config.has_final_norm else x)

    def attention_pooler(self, x: np.ndarray) -> np.ndarray:
        """What the probe finds in the tokens, (N, D) -> (D,)."""
        A = self.config.pooler_heads
        query = self.dense(self.weight("pooler.probe")[0], "pooler.attention.query")
        heads = []
        for q, k, v in zip(
            np.split(query, A, axis=1),
            np.split(self.dense(x, "pooler.attention.key"), A, axis=1),
            np.split(self.dense(x, "pooler.attention.value"), A, axis=1),
            strict=True,
        ):
            heads.append(_softmax(q @ k.T / math.sqrt(q.shape[1])) @ v)  # (1, D/A)
        x = self.dense(np.concatenate(heads, axis=1), "pooler.attention.output.dense")[0]
        inner = self.dense(self.norm(x, "pooler.layernorm"), "pooler.intermediate.dense")
        inner = self.activation(inner, self.config.hidden_act)
        return x + self.dense(inner, "pooler.output.dense")

    def head(self, x: np.ndarray) -> np.ndarray:
        """Logits, or without a classifier the pooled output; one vector."""
        config, T = self.config, self.config.num_prefix_tokens
        if "lm_head.weight" in self.tensors:
            return self.dense(self.norm(x[T:], "lm_layernorm"), "lm_head").reshape(-1)
        if "cls_classifier.weight" in self.tensors:
            both = [self.dense(x[0], "cls_classifier"), self.dense(x[1], "distillation_classifier")]
            return np.add(*both) / 2
        first = config.first_pooled_token
        mean = x[first:].mean(axis=0)
        pooled = mean if config.pooling == "mean" else x[0]
        if "pooler.probe" in self.tensors:
            pooled = self.attention_pooler(x[first:])
        elif "pooler.layernorm.weight" in self.tensors:
            pooled = self.norm(pooled, "pooler.layernorm")
        elif "pooler.dense.weight" in self.tensors and (
            config.use_representation_layer or "classifier.weight" not in self.tensors
        ):
            pooled = self.activation(self.dense(pooled, "pooler.dense"), config.pooler_act)
        if "classifier.weight" not in self.tensors:
            return pooled
        if config.pooling == "cls_mean":
            pooled = np.concatenate([pooled, mean])
        return self.dense(pooled, "classifier")


def forward(config: ViTConfig, tensors: Mapping[str, TensorLike], image: np.ndarray) -> np.ndarray:
    """Logits of one image; the mean of both heads of a distilled DeiT, the visual tokens of a
    pretrained BEiT, and where there is no classifier the pooled output.

    Args:
        config: what the network is.
        tensors: canonical name without a prefix -> tensor.
        image: (C, H, W), of the config's size.

    Returns:
        One vector, float64.

    Raises:
        ConfigError: an activation is not known here.
    """
    return _Network(config, tensors).run(np.asarray(image, np.float64))
