"""Training mode of the twins: both are handed the same masks, so dropout and stochastic depth are
compared to the last bits, and so is the gradient of every parameter through them.

The masks replace the draws alone, `jax.random.bernoulli` and `torch.nn.functional.dropout`: which
module drops, where, at what rate, what shape of mask and how the rest is scaled are each twin's
own. That the draws come element by element at their rates, the tests of the contracts and of the
families show.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from networks import InMemory, flax_twin, images, random_weights, torch_twin
from tolerances import BOUNDS

import vit_flax
import vit_torch
from vit_convert.formats import TREE
from vit_convert.rules import to_canonical
from vit_flax.model import FlaxViTDropPath
from vit_torch.parity import difference
from vit_torch.pretrained import to_numpy

HIDDEN, ATTENTION, DEPTH = 0.2, 0.3, 0.4
DINO: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": (8, 12),
    "patch_size": 4,
    "num_labels": 5,
    "hidden_dropout_prob": HIDDEN,
    "attention_probs_dropout_prob": ATTENTION,
    "drop_path_rate": DEPTH,
}
SMALL = {**DINO, "intermediate_size": 20}
BIASES = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
POSITIONS = {"use_absolute_position_embeddings": True}


class Case(NamedTuple):
    """A model's class, what differs from the small configuration, and whether it is run always."""

    name: str
    fields: Mapping[str, Any] = MappingProxyType({})
    quick: bool = True


CASES = {
    "vit": Case("ViTModel"),
    "vit classifier": Case("ViTForImageClassification", quick=False),
    "vit decoder": Case("ViTForMaskedImageModeling", {"encoder_stride": 4}),
    "vit with everything": Case(
        "ViTForImageClassification",
        {
            "layer_scale_init_value": 0.1,
            "num_register_tokens": 2,
            "position_tokens": "cls",
            "use_swiglu_ffn": True,
            "pooling": "mean",
            "norm_after_pooling": True,
        },
    ),
    "deit": Case("DeiTModel", quick=False),
    "deit classifier": Case("DeiTForImageClassification", quick=False),
    "deit teacher": Case("DeiTForImageClassificationWithTeacher"),
    "deit decoder": Case("DeiTForMaskedImageModeling", {"encoder_stride": 4}, quick=False),
    "beit": Case("BeitModel", {**BIASES, **POSITIONS, "use_mask_token": True}),
    "beit classifier": Case(
        "BeitForImageClassification", {"use_relative_position_bias": True}, quick=False
    ),
    "beit tokens": Case(
        "BeitForMaskedImageModeling",
        {**BIASES, "use_mask_token": True, "use_mean_pooling": False, "vocab_size": 11},
    ),
    "dinov2": Case("Dinov2Model", quick=False),
    "dinov2 classifier": Case(
        "Dinov2ForImageClassification", {"use_swiglu_ffn": True, "use_mask_token": False}
    ),
    "registers": Case("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}),
    "registers classifier": Case(
        "Dinov2WithRegistersForImageClassification",
        {"num_register_tokens": 3, "use_mask_token": False},
        quick=False,
    ),
}
BATCH = 3


class Draws:
    """Masks by the module that asks, its how-many-eth question, and the shape.

    Attributes:
        seen: (path of the module, number of the draw) -> (shape of the mask, rate).
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], tuple[tuple[int, ...], float]] = {}
        self.path = ""

    def kept(self, shape: Any, rate: float) -> np.ndarray:
        """Where the module at `path` keeps its input."""
        number = sum(path == self.path for path, _ in self.seen)
        shape = tuple(shape)
        self.seen[self.path, number] = (shape, round(float(rate), 7))
        rng = np.random.default_rng(zlib.crc32(f"{self.path} {number} {shape}".encode()))
        kept = rng.random(shape) >= rate
        if kept.size > 1:  # a draw without a zero or without a one would show nothing
            kept.flat[0], kept.flat[-1] = False, True
        return kept


@contextlib.contextmanager
def draws_of_flax(monkeypatch):
    """While entered, Flax's dropout draws from the table."""
    draws = Draws()

    def bernoulli(key, p=0.5, shape=None, **kwargs):
        return jnp.asarray(draws.kept(shape, 1.0 - p))

    def name_the_module(call, args, kwargs, context):
        if isinstance(context.module, (nn.Dropout, FlaxViTDropPath)):
            draws.path = ".".join(context.module.path)
        return call(*args, **kwargs)

    with monkeypatch.context() as patch, nn.intercept_methods(name_the_module):
        patch.setattr(jax.random, "bernoulli", bernoulli)
        yield draws


@contextlib.contextmanager
def draws_of_torch(model: torch.nn.Module, monkeypatch):
    """While entered, PyTorch's dropout draws from the table."""
    draws, hooks = Draws(), []

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0.0:
            return x
        return x * torch.tensor(draws.kept(x.shape, p), dtype=x.dtype) / (1.0 - p)

    for path, module in model.named_modules():
        if not list(module.children()):

            def name_the_module(module, inputs, path=path):
                draws.path = path

            hooks.append(module.register_forward_pre_hook(name_the_module))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "dropout", dropout)
            yield draws
    finally:
        for hook in hooks:
            hook.remove()


def config_of(case: Case):
    family = case.name.split("For")[0].removesuffix("Model")
    small = DINO if family.startswith("Dinov2") else SMALL
    return getattr(vit_torch, f"{family}Config")(**{**small, **case.fields})


def inputs_of(case: Case, config) -> dict[str, np.ndarray]:
    """Labels and masks, as arrays."""
    rng = np.random.default_rng(3)
    inputs: dict[str, np.ndarray] = {}
    if "Masked" in case.name or (case.name.endswith("Model") and config.use_mask_token):
        mask = rng.integers(0, 2, (BATCH, config.num_patches))
        mask[:, 0], mask[:, 1] = 0, 1
        inputs["bool_masked_pos"] = mask.astype(bool)
    if case.name == "BeitForMaskedImageModeling":
        # Patches that are not masked have one too, which is not looked at; of the masked ones the
        # first (1 is masked) is left out.
        inputs["labels"] = rng.integers(0, config.vocab_size, inputs["bool_masked_pos"].shape)
        inputs["labels"][0, 1] = -100
    elif case.name.endswith("Classification"):
        inputs["labels"] = np.array([4, -100, 2])
    return inputs


def scalar(output, array) -> Any:
    """A sum over every output, each entry with its own weight."""
    rng = np.random.default_rng(8)
    total = 0.0
    for value in output.values():
        total = total + (value * array(rng.normal(size=tuple(value.shape)))).sum()
    return total


def canonical(gradient: Any, model) -> dict[str, np.ndarray]:
    """A Flax tree of gradients under the twin's names, in its layouts."""
    flat = flatten_dict(gradient, sep="/")
    mapped = to_canonical({n: InMemory(np.asarray(g)) for n, g in flat.items()}, TREE)
    prefix = f"{model.config.base_model_prefix}."
    return {name.removeprefix(prefix): t.read() for name, t in mapped.tensors.items()}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if case.quick else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_outputs_and_gradients_under_the_same_masks(name, monkeypatch):
    case = CASES[name]
    config = config_of(case)
    ours_class, twin_class = getattr(vit_flax, f"Flax{case.name}"), getattr(vit_torch, case.name)
    weights = random_weights(config, ours_class.head)
    x, inputs = images(config, BATCH), inputs_of(case, config)

    twin = torch_twin(twin_class, config, weights, torch.float64).train()
    given = {n: torch.tensor(v) for n, v in inputs.items()}
    with draws_of_torch(twin, monkeypatch) as theirs:
        output = twin(torch.tensor(x), **given, return_dict=True)
        scalar(output, torch.tensor).backward()
    want = {n: to_numpy(p.grad) for n, p in twin.named_parameters()}

    with jax.enable_x64(True), draws_of_flax(monkeypatch) as draws:
        model = flax_twin(ours_class, config, weights, jnp.float64)

        def run(params):
            outputs = model.module.apply(
                {"params": params},
                jnp.asarray(x.transpose(0, 2, 3, 1)),
                False,
                return_dict=True,
                rngs={"dropout": jax.random.PRNGKey(0)},
                **inputs,
            )
            return scalar(outputs, jnp.asarray), outputs

        gradient, ours = jax.jit(jax.grad(run, has_aux=True))(model.params)
        got = canonical(gradient, model)

    assert draws.seen == theirs.seen
    check_draws(draws.seen, config)
    assert ours.keys() == output.keys()
    for field, value in output.items():
        stage = difference(field, np.asarray(ours[field]), to_numpy(value.detach()))
        assert stage.max_abs <= BOUNDS["twins float64"], stage
    prefix = f"{config.base_model_prefix}."
    assert got.keys() == {n.removeprefix(prefix) for n in want}
    for path, value in want.items():
        stage = difference(path, got[path.removeprefix(prefix)], value)
        # The softmax does not see the key's bias: that gradient is rounding and nothing else.
        scale = 1.0 if "key.bias" in path else stage.scale
        assert scale > 1e-6, f"{path} has no gradient to compare"
        assert stage.max_abs <= BOUNDS["gradients float64"] * scale, stage


def check_draws(seen: dict[tuple[str, int], tuple[tuple[int, ...], float]], config) -> None:
    """Every place that drops does, at its rate: elements where it is dropout, images where it is
    stochastic depth."""
    B, A, D = BATCH, config.num_attention_heads, config.hidden_size
    S = config.num_prefix_tokens + config.num_patches
    want: dict[tuple[str, int], tuple[tuple[int, ...], float]] = {}
    prefix = next(iter(seen))[0].split("embeddings.")[0]
    want[f"{prefix}embeddings.dropout", 0] = ((B, S, D), HIDDEN)
    for i, rate in enumerate(config.drop_path_rates):
        layer = f"{prefix}encoder.layer.{i}"
        want[f"{layer}.attention.attention.dropout", 0] = ((B, A, S, S), ATTENTION)
        want[f"{layer}.attention.output.dropout", 0] = ((B, S, D), HIDDEN)
        want[f"{layer}.output.dropout", 0] = ((B, S, D), HIDDEN)
        if rate:
            for number in (0, 1):
                want[f"{layer}.drop_path", number] = ((B, 1, 1), round(rate, 7))
    assert seen == want
