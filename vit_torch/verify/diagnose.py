"""Why do two models differ? The first differing stage is run again under what is known to go wrong.

The stage's module of a PyTorch twin is copied, changed in one respect, and fed what the other model
fed its own; the change that makes the results agree is the likely cause.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vit_common.config import ViTConfig
from vit_common.positions import ResizeRule
from vit_torch.model import ViTPart, classifier_input
from vit_torch.outputs import BaseModelOutputWithPooling
from vit_torch.pretrained import ViTPreTrainedModel
from vit_torch.verify.stages import first

_ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "silu", "tanh", "selu")
_EPS = (1e-12, 1e-6, 1e-5, 1e-3)
_FACTOR = 20.0
"""A change explains a difference if it makes it this many times smaller."""


@dataclass(frozen=True)
class Cause:
    """A change that makes the second model's stage agree with the first's.

    Attributes:
        change: what to change, such as "hidden_act = 'gelu_new'".
        before, after: largest difference without and with it.
    """

    change: str
    before: float
    after: float


def diagnose(
    stage: str,
    model: ViTPreTrainedModel,
    inputs: np.ndarray,
    wanted: dict[str, np.ndarray],
    bound: float,
    grid: tuple[int, int] | None = None,
) -> list[Cause] | None:
    """Changes to `model` that make it agree with another at one stage, the best first.

    Args:
        stage: the first stage that differs, as `vit_torch.verify.stages` names it.
        model: the twin to change; it is left as it was.
        inputs: what the other model fed that part: pixels for the embeddings, else the hidden
            states before it.
        wanted: stages of the other model.
        bound: a difference up to which the two agree.
        grid: patches down and across, where not those of the model's own image size.

    Returns:
        None where no change of such a stage is known, so that none was tried.
    """
    part, name = _part(stage, model)
    if part is None or name not in wanted:
        return None
    grid = grid or model.config.grid_size
    target = wanted[name]
    x = torch.as_tensor(inputs, device=model.device).to(model.dtype)
    before = _difference(_run(name, part, x, model, grid), target)
    found = []
    for change, changed in _alternatives(name, part, model):
        try:
            after = _difference(_run(name, changed, x, model, grid), target)
        except Exception:  # a change that this network cannot have
            continue
        if _explains(before, after, bound):
            found.append(Cause(change, before, after))
    return sorted(found, key=lambda cause: cause.after)


def _explains(before: float, after: float, bound: float) -> bool:
    """Whether a change of the difference is one for the better; none is that leaves it infinite."""
    better = math.isfinite(after) and after < before
    return better and (after <= bound or after * _FACTOR <= before)


def _difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    if tuple(ours.shape) != theirs.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        error = np.abs(ours.detach().cpu().double().numpy() - theirs)
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))


def _part(stage: str, model: ViTPreTrainedModel) -> tuple[nn.Module | None, str]:
    """The module to run for a stage, and the stage it is compared at: a block as a whole."""
    base = model.base_model
    if block := re.match(r"block (\d+)", stage):
        return base.encoder.layer[int(block[1])], f"block {block[1]}"
    modules = {
        "patches": base.embeddings,
        "embeddings": base.embeddings,
        "final norm": getattr(base, "layernorm", None),
        "pooled": getattr(base, "pooler", None),
        "logits": getattr(model, "classifier", None),
    }
    return modules.get(stage), "embeddings" if stage == "patches" else stage


def _run(
    name: str, part: Any, x: torch.Tensor, model: ViTPreTrainedModel, grid: tuple[int, int]
) -> torch.Tensor:
    with torch.no_grad():
        if callable(part) and not isinstance(part, nn.Module):
            return part(x)
        if name.startswith("block"):
            encoder = model.base_model.encoder
            shared = getattr(encoder, "relative_position_bias", None)
            bias = None if shared is None else shared(grid)
            turn = encoder.rotations(grid, x)[int(name.split()[1])]
            return first(part(x, None, bias, False, grid, turn))
        if name == "embeddings":
            return part(x, interpolate_pos_encoding=True)
        if name == "logits":
            return part(_pooled(x, model.config, model))
        return part(x)


def _pooled(x: torch.Tensor, config: ViTConfig, model: Any) -> torch.Tensor:
    pooler = getattr(model.base_model, "pooler", None)
    pooled = None if pooler is None else pooler(x)
    return classifier_input(BaseModelOutputWithPooling(x, pooled), config)


# -- what can be different


def _alternatives(name: str, part: Any, model: ViTPreTrainedModel) -> Iterator[tuple[str, Any]]:
    """(what is changed, the changed module) for each thing known to go wrong in a stage."""
    if name.startswith("block"):
        yield from _activations(part)
        yield from _norms(part)
        yield from _crossed(part)
        yield from _transposed(part)
        yield from _scales(part)
        yield from _heads(part)
        yield from _precisions(part)
    elif name == "embeddings":
        yield from _images(part)
        yield from _positions(part)
        yield from _precisions(part)
    elif name in ("final norm", "pooled"):
        yield from _norms(part)
        yield from _transposed(part)
        yield from _activations(part, "pooler_act")
    elif name == "logits":
        yield from _transposed(part)
        yield from _pooling(part, model)


def _copy(part: nn.Module, **fields: Any) -> Any:
    """A copy with fields of its configuration changed."""
    made = copy.deepcopy(part)
    configs = {id(m.config): m.config for m in made.modules() if isinstance(m, ViTPart)}
    for config in configs.values():
        for field, value in fields.items():
            object.__setattr__(config, field, value)
    return made


def _activations(part: nn.Module, field: str = "hidden_act") -> Iterator[tuple[str, Any]]:
    config = getattr(part, "config", None)
    if config is None:
        return
    for name in _ACTIVATIONS:
        if name != getattr(config, field):
            yield f"{field} = {name!r}", _copy(part, **{field: name})


def _norms(part: nn.Module) -> Iterator[tuple[str, Any]]:
    norms = [m for m in part.modules() if isinstance(m, nn.LayerNorm)]
    if not norms:
        return
    for eps in _EPS:
        if eps != norms[0].eps:
            made = copy.deepcopy(part)
            for module in made.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = eps
            yield f"layer_norm_eps = {eps:g}", made
    yield (
        "layer norm's variance as E[x^2] - E[x]^2 (fast variance)",
        _replaced(part, nn.LayerNorm, _FastNorm),
    )


class _FastNorm(nn.Module):
    """Layer norm with the variance in one pass, in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        y = x.float()
        mean = y.mean(-1, keepdim=True)
        variance = (y * y).mean(-1, keepdim=True) - mean * mean
        y = (y - mean) * torch.rsqrt(variance + self.norm.eps)
        return (y * self.norm.weight.float() + self.norm.bias.float()).to(x.dtype)


def _replaced(part: nn.Module, kind: type, make: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy with every module of a kind put into another."""
    made = copy.deepcopy(part)
    if isinstance(made, kind):
        return make(made)
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if type(child) is kind:
                setattr(module, name, make(child))
    return made


_QKV = ("query", "key", "value")


def _crossed(part: Any) -> Iterator[tuple[str, Any]]:
    for order in list(itertools.permutations(_QKV))[1:]:
        made = copy.deepcopy(part)
        attention, own = made.attention.attention, part.attention.attention
        for place, source in zip(_QKV, order, strict=True):
            setattr(attention, place, copy.deepcopy(getattr(own, source)))
        pairs = [f"{a} from {b}" for a, b in zip(_QKV, order, strict=True) if a != b]
        yield f"crossed weights: {', '.join(pairs)}", made


def _transposed(part: nn.Module) -> Iterator[tuple[str, Any]]:
    names = [
        name
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and module.in_features == module.out_features
    ]
    groups = {name or "the layer": [name] for name in names}
    if len(names) > 1:
        groups["every square layer"] = names
    for title, group in groups.items():
        made = copy.deepcopy(part)
        for name in group:
            layer = made.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
        yield f"transposed kernel of {title}", made


def _scales(part: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(part, "lambda_1"):
        return
    names = [name for name in ("lambda_1", "lambda_2") if hasattr(part, name)]
    if len(names) > 1:
        made = copy.deepcopy(part)
        made.lambda_1, made.lambda_2 = made.lambda_2, made.lambda_1
        yield "layer scales crossed", made
    for text, change in (
        ("no layer scale", torch.ones_like),
        ("layer scale applied twice", lambda scale: scale * scale),
    ):
        made = copy.deepcopy(part)
        for name in names:
            setattr(made, name, nn.Parameter(change(getattr(made, name).detach())))
        yield text, made


def _heads(part: Any) -> Iterator[tuple[str, Any]]:
    config = part.config
    for heads in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32):
        if heads != config.num_attention_heads and config.hidden_size % heads == 0:
            yield f"num_attention_heads = {heads}", _copy(part, num_attention_heads=heads)


class _Rounded(nn.Module):
    """A layer whose matrix product has inputs of fewer bits, as accelerators take by default."""

    def __init__(self, layer: Any, keep: int) -> None:
        super().__init__()
        self.layer, self.keep = layer, keep

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        bits = x.float().contiguous().view(torch.int32)
        drop = 23 - self.keep
        rounded = (bits + (1 << (drop - 1))) >> drop << drop
        return rounded.view(torch.float32)

    def forward(self, x):
        weight, bias = self._round(self.layer.weight), self.layer.bias
        bias = None if bias is None else bias.float()
        if isinstance(self.layer, nn.Conv2d):
            y = F.conv2d(self._round(x), weight, bias, self.layer.stride)
        else:
            y = F.linear(self._round(x), weight, bias)
        return y.to(x.dtype)


def _precisions(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, keep in (("bfloat16", 7), ("TF32", 10)):
        made = _replaced(part, nn.Linear, partial(_Rounded, keep=keep))
        made = _replaced(made, nn.Conv2d, partial(_Rounded, keep=keep))
        yield f"matrix products in {name}", made


def _images(part: Any) -> Iterator[tuple[str, Any]]:
    kernel = part.patch_embeddings.projection.weight
    changes = {
        "channels in the order BGR": kernel.flip(1),
        "patch kernel with height and width exchanged": kernel.transpose(2, 3),
        "patch kernel upside down": kernel.flip(2, 3),
    }
    for text, changed in changes.items():
        made = copy.deepcopy(part)
        made.patch_embeddings.projection.weight = nn.Parameter(changed.detach().contiguous())
        yield text, made


def _positions(part: Any) -> Iterator[tuple[str, Any]]:
    for rule in get_args(ResizeRule):
        if rule != part.config.position_resize:
            yield f"position_resize = {rule!r}", _copy(part, position_resize=rule)
    if not hasattr(part, "position_embeddings"):
        return
    positions = part.position_embeddings.detach()
    k, grid = part.config.num_prefix_positions, part.config.grid_size
    table = positions[:, k:].reshape(1, *grid, -1)
    changes = {
        "positions one token later": positions.roll(1, 1),
        "positions one token earlier": positions.roll(-1, 1),
        "no positions": torch.zeros_like(positions),
    }
    if grid[0] == grid[1]:
        turned = table.transpose(1, 2).reshape(1, grid[0] * grid[1], -1)
        changes["positions with rows and columns exchanged"] = torch.cat(
            (positions[:, :k], turned), 1
        )
    for text, changed in changes.items():
        made = copy.deepcopy(part)
        made.position_embeddings = nn.Parameter(changed.contiguous())
        yield text, made


def _pooling(part: nn.Module, model: ViTPreTrainedModel) -> Iterator[tuple[str, Any]]:
    for pooling in ("cls", "mean", "cls_mean"):
        config = copy.deepcopy(model.config)
        if config.pooling == pooling or isinstance(
            getattr(type(config), "pooling", None), property
        ):
            continue
        object.__setattr__(config, "pooling", pooling)

        def run(x, config=config):
            return part(classifier_input(BaseModelOutputWithPooling(x, None), config))

        yield f"pooling = {pooling!r}", run


# -- images


_STATISTICS = {  # one value is of every channel
    "of ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "0.5": ([0.5], [0.5]),
    "of CLIP": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "none (0 and 1)": ([0.0], [1.0]),
}


def diagnose_pixels(processor: Any, image: Any, wanted: np.ndarray, bound: float) -> list[Cause]:
    """Changes to an image processor that make it agree with what another made of an image."""

    def made(picture: Any, **options: Any) -> np.ndarray:
        return np.asarray(processor(picture, return_tensors="np", **options)["pixel_values"])

    before = _error(made(image), wanted)
    trials: list[tuple[str, Callable[[], np.ndarray]]] = []
    values = np.asarray(image)
    if values.ndim == 3:
        trials.append(("channels in the order BGR", lambda: made(values[..., ::-1])))
    for name, (mean, std) in _STATISTICS.items():
        times = wanted.shape[1] // len(mean)
        statistics = {"image_mean": mean * times, "image_std": std * times}
        trials.append(
            (
                f"mean and standard deviation {name}",
                partial(made, image, do_normalize=True, **statistics),
            )
        )
    for code, name in ((0, "nearest"), (1, "Lanczos"), (2, "bilinear"), (3, "bicubic")):
        trials.append((f"resize filter {name}", partial(made, image, resample=code)))
    trials.append(("no rescaling to [0, 1]", lambda: made(image, do_rescale=False)))
    found = []
    for text, run in trials:
        try:
            after = _error(run(), wanted)
        except Exception:  # an option this processor does not have
            continue
        if _explains(before, after, bound):
            found.append(Cause(text, before, after))
    return sorted(found, key=lambda cause: cause.after)


def _error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max()) if a.shape == b.shape else float("inf")
