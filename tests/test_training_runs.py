"""The same training run in both frameworks: the twin trainer beside torch.optim, timm and
Transformers; JAX beside the twin trainer, step by step; and the cause of each drift by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from networks import (
    InMemory,
    flax_twin,
    images,
    make_config,
    random_weights,
    reference_config,
    torch_twin,
)
from timm_models import timm
from tolerances import BOUNDS
from torch.nn import functional as F

import vit_flax
import vit_torch
from vit_cli.commands import verify_report
from vit_cli.main import main
from vit_common.checks import resolve_problem_type
from vit_common.errors import InputError
from vit_common.recipes import RECIPES, Recipe, learning_rates
from vit_common.recipes import recipe as recipe_of
from vit_convert.formats import FORMATS
from vit_convert.rules import to_canonical
from vit_torch.training import LAMB, Average, Lion, Trainer, fine_tune, make_optimizer, schedule_of
from vit_torch.training import settings as settings_of
from vit_torch.verify import Verification
from vit_torch.verify.definitions import Setup
from vit_torch.verify.training import (
    FlaxRun,
    TorchRun,
    compare_runs,
    is_key_bias,
    make_batches,
    quiet,
    verify_training,
)

timm_optim = importlib.import_module("timm.optim")
timm_scheduler = importlib.import_module("timm.scheduler")
timm_utils = importlib.import_module("timm.utils")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
    "drop_path_rate": 0.0,
}
# Every definition that a run can have, at once.
FULL = Recipe(
    learning_rate=1e-3,
    warmup_steps=5,
    clip=1.0,
    layer_decay=0.75,
    ema=0.99,
    label_smoothing=0.1,
    accumulate=2,
)


def network(name="ViTForImageClassification", seed=0, **fields):
    """A small PyTorch twin in float64, with random weights."""
    cls = getattr(vit_torch, name)
    config = cls.config_class(**{**SIZES, **fields})
    return torch_twin(cls, config, random_weights(config, cls.head, seed), torch.float64)


def batches_of(model, steps, batch=4, accumulate=1):
    problem = resolve_problem_type(model.config, True)
    return lambda: make_batches(
        model.config, model.head, problem, steps=steps, batch=batch, accumulate=accumulate
    )


def tensors(batch):
    return torch.tensor(batch["pixel_values"]), torch.tensor(batch["labels"])


# -- the twin trainer


def by_torch(model, batches, recipe, optimizer, scheduler):
    """The run as anyone would write it; returns the losses."""
    optimizer, losses = optimizer(model.parameters()), []
    schedule = scheduler(optimizer)
    for batch in batches:
        pixels, labels = tensors(batch)
        loss = F.cross_entropy(model(pixels).logits, labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


BY_TORCH = {
    "AdamW, cosine": (
        {"optimizer": "adamw", "schedule": "cosine", "b2": 0.98, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, 3, 12),
    ),
    "SGD, linear": (
        {"optimizer": "sgd", "schedule": "linear", "weight_decay": 0.0},
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda o: transformers.get_linear_schedule_with_warmup(o, 3, 12),
    ),
    "Nesterov, constant": (
        {"optimizer": "sgd", "schedule": "constant", "weight_decay": 0.0, "nesterov": True},
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
        lambda o: transformers.get_constant_schedule_with_warmup(o, 3),
    ),
}


@pytest.mark.parametrize("name", BY_TORCH)
def test_the_twin_trainer_is_a_plain_loop_over_torch_optim(name):
    fields, optimizer, scheduler = BY_TORCH[name]
    recipe = Recipe(
        learning_rate=1e-2,
        warmup_steps=3,
        no_decay="none",
        clip=0.5,
        clip_rule="torch",
        label_smoothing=0.1,
        **fields,
    )
    model, peer = network(), network()
    batches = list(batches_of(model, 12)())
    wanted = by_torch(peer, batches, recipe, optimizer, scheduler)
    found = fine_tune(model, batches, recipe)
    np.testing.assert_allclose([row["loss"] for row in found], wanted, rtol=0, atol=1e-14)
    assert abs(wanted[-1] - wanted[0]) > 0.05
    for (path, ours), theirs in zip(model.named_parameters(), peer.parameters(), strict=True):
        atol = 1e-9 if is_key_bias(path) else 1e-13
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=path)


def test_lion_is_timms():
    model, peer = network(), network()
    optimizer = timm_optim.Lion(peer.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.3)
    recipe = Recipe(optimizer="lion", b1=0.9, b2=0.98, weight_decay=0.3, no_decay="none")
    ours = make_optimizer(recipe, model)
    assert isinstance(ours, Lion)
    for batch in batches_of(model, 3)():
        pixels, labels = tensors(batch)
        for each, network_ in ((ours, model), (optimizer, peer)):
            each.zero_grad()
            F.cross_entropy(network_(pixels).logits, labels).backward()
            for parameter in network_.parameters():
                parameter.grad.mul_(parameter.grad.abs() > 1e-12)  # signs of rounding
        for group in ours.param_groups:
            group["lr"] = 1e-3
        ours.step()
        optimizer.step()
    for (path, mine), theirs in zip(model.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14, msg=path)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lamb_is_timms(decay):
    model, peer = network(), network()
    options = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": decay}
    theirs = timm_optim.Lamb(peer.parameters(), lr=1e-2, max_grad_norm=None, **options)
    ours = LAMB(model.parameters(), 1e-2, **options)
    for batch in batches_of(model, 3)():
        pixels, labels = tensors(batch)
        for each, network_ in ((ours, model), (theirs, peer)):
            each.zero_grad()
            F.cross_entropy(network_(pixels).logits, labels).backward()
            each.step()
    for (path, mine), other in zip(model.named_parameters(), peer.parameters(), strict=True):
        if not is_key_bias(path):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-13, msg=path)


@pytest.mark.parametrize("rule", ["timm", "mae"])
def test_rates_and_decay_are_timms(rule):
    """By timm's groups for its own model, whose names the converter turns into ours. MAE's rule
    differs in the final norm only (util/lr_decay.py of facebookresearch/mae)."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    peer = timm.models.VisionTransformer(**sizes, num_classes=5, mlp_ratio=1.5)
    groups = timm_optim.param_groups_layer_decay(
        peer, 0.05, no_weight_decay_list=peer.no_weight_decay(), layer_decay=0.75
    )
    of = {id(p): group for group in groups for p in group["params"]}
    table = next(t for t in FORMATS if t.name == "timm" and "vit" in t.families)
    model = network()
    found = settings_of(
        Recipe(layer_decay=0.75, layer_decay_rule=rule, no_decay="timm", weight_decay=0.05), model
    )
    for field, ours in (("lr_scale", "scale"), ("weight_decay", "decay")):
        full = {
            name: InMemory(np.full(tuple(p.shape), of[id(p)][field]))
            for name, p in peer.named_parameters()
        }
        wanted = {n: t.read().flat[0] for n, t in to_canonical(full, table).tensors.items()}
        if rule == "mae" and ours == "scale":
            assert wanted["layernorm.weight"] == 0.75
            wanted |= {"layernorm.weight": 1.0, "layernorm.bias": 1.0}
        got = {n.removeprefix("vit."): getattr(s, ours) for n, s in found.items()}
        assert got == wanted


@pytest.mark.slow  # accelerate takes seconds to import
@pytest.mark.parametrize("family", ["ViT", "Beit", "Dinov2"])
def test_decay_by_transformers_is_that_of_its_trainer(family, tmp_path):
    fields = {"use_relative_position_bias": True} if family == "Beit" else {}
    model = network(f"{family}ForImageClassification", **fields)
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    )
    found = settings_of(Recipe(no_decay="transformers", weight_decay=0.1), model)
    decayed = {name for name, setting in found.items() if setting.decay}
    assert decayed == set(trainer.get_decay_parameter_names(model))


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [({"warmup_prefix": True}, True), ({"warmup_prefix": False}, False)],
    ids=["after the warm-up", "under the warm-up"],
)
def test_cosine_is_timms(fields, prefix):
    recipe = Recipe(
        learning_rate=0.3,
        warmup_steps=4,
        warmup_learning_rate=1e-3,
        final_learning_rate=1e-5,
        schedule="cosine",
        **fields,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.3)
    peer = timm_scheduler.CosineLRScheduler(
        optimizer,
        t_initial=16 if prefix else 20,
        lr_min=1e-5,
        warmup_t=4,
        warmup_lr_init=1e-3,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    rate = schedule_of(recipe, 20)
    for step in range(20):
        peer.step_update(step)
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("rule", ["plain", "warmup"])
def test_the_average_is_timms_and_torchs(rule):
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    holder = torch.nn.Module()
    holder.weight = parameter
    if rule == "warmup":
        peer = timm_utils.ModelEmaV3(holder, decay=0.9, use_warmup=True, warmup_power=2 / 3)
    else:
        peer = torch.optim.swa_utils.AveragedModel(
            holder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        peer.n_averaged += 1  # else it takes the first parameters as they are
    ours = Average([("weight", parameter)], 0.9, rule)
    for step in range(1, 6):
        with torch.no_grad():
            parameter.add_(torch.tensor([1.0, step, -(step**2)], dtype=torch.float64))
        ours.update()
        peer.update(holder, step) if rule == "warmup" else peer.update_parameters(holder)
        torch.testing.assert_close(ours.values["weight"], peer.module.weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("fields", "recipe", "labels", "wanted"),
    [
        ({}, {"label_smoothing": 0.2}, [4, -100, 2], F.cross_entropy),
        (
            {"problem_type": "multi_label_classification"},
            {},
            np.eye(3, 5),
            F.binary_cross_entropy_with_logits,
        ),
        ({"num_labels": 1}, {}, [[0.5], [2.0], [-1.0]], F.mse_loss),
        (
            {},
            {"loss": "bce", "label_smoothing": 0.0},
            [4, 0, 2],
            F.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["classes", "several labels", "numbers", "bce"],
)
def test_losses_are_torchs(fields, recipe, labels, wanted):
    model = network(**fields)
    x, labels = torch.tensor(images(model.config, 3)), torch.tensor(np.asarray(labels))
    logits = model(x).logits.detach()
    options = (
        {"label_smoothing": 0.2} if "label_smoothing" in recipe and "loss" not in recipe else {}
    )
    target = F.one_hot(labels, 5).double() if recipe.get("loss") == "bce" else labels
    value = wanted(logits, target, **options)
    found = Trainer(model, Recipe(**recipe), 10).step({"pixel_values": x, "labels": labels})
    assert found["loss"] == pytest.approx(value.item(), rel=1e-13)


def test_a_batch_in_parts_is_the_batch():
    found = []
    for parts in (1, 2, 4):
        model = network()
        trainer = Trainer(model, FULL.replace(accumulate=parts), 40)
        for batch in batches_of(model, 4, batch=8, accumulate=2)():
            trainer.step(batch)
        found.append(dict(model.named_parameters()))
    for name, whole in found[0].items():
        for parts in found[1:]:
            atol = 1e-9 if is_key_bias(name) else 1e-12
            torch.testing.assert_close(parts[name], whole, rtol=0, atol=atol)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_compared(name):
    """Its rates are those of the JAX trainer, and the twin has its optimizer or says that not."""
    wanted = recipe_of(name, steps=40)
    rates = schedule_of(wanted, 40)
    np.testing.assert_allclose(
        [rates(step) for step in range(40)], learning_rates(wanted, 40), rtol=1e-13, atol=1e-18
    )
    if wanted.optimizer == "muon" or wanted.lora:
        with pytest.raises(InputError, match="the PyTorch twin"):
            quiet(wanted)
        return
    quieted, notes = quiet(wanted)
    trainer = Trainer(network(), quieted, 40)
    for batch in batches_of(trainer.model, 1, 16)():
        assert np.isfinite(trainer.step(batch)["loss"])
    assert any("without augmentation" in note for note in notes)


def test_what_the_twin_trainer_refuses():
    model = network()
    with pytest.raises(InputError, match=r"lion, lamb, lars; the recipe wants muon"):
        make_optimizer(Recipe(optimizer="muon"), model)
    with pytest.raises(InputError, match=r"momentum_dtype"):
        make_optimizer(Recipe(optimizer="sgd", momentum_dtype="bfloat16"), model)
    with pytest.raises(InputError, match=r"no parameter matches 'nothing'"):
        make_optimizer(Recipe(train="classifier,nothing"), model)
    with pytest.raises(InputError, match=r"not a regular expression"):
        make_optimizer(Recipe(train="("), model)
    with pytest.raises(InputError, match=r"at least one batch"):
        fine_tune(model, [], Recipe())
    with pytest.raises(InputError, match=r"batch of 3 images cannot be run in 2"):
        fine_tune(model, batches_of(model, 1, 3)(), Recipe(accumulate=2, warmup_steps=0))
    with pytest.raises(InputError, match=r"warm-up must be shorter"):
        schedule_of(Recipe(warmup_steps=5), 5)


# -- JAX beside it


class Case(NamedTuple):
    """A model, what its recipe differs in from `FULL`, and the steps; 200 are run among the slow
    tests."""

    name: str
    fields: Mapping[str, Any] = MappingProxyType({})
    recipe: Mapping[str, Any] = MappingProxyType({})
    steps: int = 200


SGD = {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.01}
BIASES = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
BEIT = {**BIASES, "use_absolute_position_embeddings": True, "use_mask_token": True}
CASES = {
    "one block": Case(
        "ViTForImageClassification", {"num_hidden_layers": 1}, {"no_decay": "transformers"}, 60
    ),
    "ViT, AdamW": Case("ViTForImageClassification"),
    "ViT, SGD": Case("ViTForImageClassification", recipe=SGD),
    "ViT, Lion": Case(
        "ViTForImageClassification", recipe={"optimizer": "lion", "learning_rate": 1e-4}
    ),
    "ViT, LAMB": Case("ViTForImageClassification", recipe={"optimizer": "lamb"}),
    "ViT, LARS": Case(
        "ViTForImageClassification", recipe={"optimizer": "lars", "learning_rate": 0.5}
    ),
    "ViT, rates by epoch": Case(
        "ViTForImageClassification",
        recipe={
            "schedule_by": "epoch",
            "warmup_prefix": False,
            "warmup_learning_rate": 1e-5,
            "final_learning_rate": 1e-5,
            "scale_by_batch": 64,
        },
    ),
    "ViT, timm's rules": Case(
        "ViTForImageClassification",
        recipe={"layer_decay_rule": "timm", "ema_rule": "warmup", "clip_rule": "torch"},
    ),
    "ViT, several labels": Case(
        "ViTForImageClassification", {"problem_type": "multi_label_classification"}
    ),
    "ViT, numbers": Case("ViTForImageClassification", {"num_labels": 1}),
    "ViT, bce": Case("ViTForImageClassification", recipe={"loss": "bce"}),
    "ViT, decoder": Case("ViTForMaskedImageModeling", {"encoder_stride": 4}),
    "ViT, head": Case("ViTForImageClassification", recipe={"train": "head", "schedule": "linear"}),
    "DeiT, AdamW": Case(
        "DeiTForImageClassificationWithTeacher", recipe={"no_decay": "transformers"}
    ),
    "DeiT, SGD": Case("DeiTForImageClassificationWithTeacher", recipe={**SGD, "nesterov": True}),
    "DeiT, one head": Case("DeiTForImageClassification"),
    "DeiT, decoder": Case("DeiTForMaskedImageModeling", {"encoder_stride": 4}, SGD),
    "BEiT, AdamW": Case(  # its mask token has no gradient and decays
        "BeitForImageClassification", BEIT, {"layer_decay_rule": "timm", "no_decay": "none"}
    ),
    "BEiT, SGD": Case("BeitForImageClassification", BEIT, SGD),
    "BEiT, tokens": Case(
        "BeitForMaskedImageModeling",
        {**BIASES, "vocab_size": 11, "use_mask_token": True, "use_mean_pooling": False},
    ),
    "DINOv2, AdamW": Case("Dinov2ForImageClassification", recipe={"train": r"classifier,layer\.1"}),
    "DINOv2, SGD": Case("Dinov2ForImageClassification", {"use_swiglu_ffn": True}, SGD),
    "registers, AdamW": Case(
        "Dinov2WithRegistersForImageClassification", recipe={"no_decay": "kernels"}
    ),
    "registers, SGD": Case(
        "Dinov2WithRegistersForImageClassification", recipe={**SGD, "no_decay": "none"}
    ),
}


def run_both(case, steps, dtype="float64"):
    """The comparison of a case's runs."""
    model = network(case.name, **case.fields)
    config, recipe = model.config, quiet(FULL.replace(**{"steps": steps, **case.recipe}))[0]
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    batches = batches_of(model, steps, 8, recipe.accumulate)
    with jax.enable_x64(dtype == "float64"):
        cls = getattr(vit_flax, f"Flax{case.name}")
        ours = FlaxRun(flax_twin(cls, config, weights, jnp.dtype(dtype)), recipe, steps)
        model = model.to(getattr(torch, dtype))
        row = compare_runs(ours, model, Setup(recipe), batches, steps=steps, dtype=dtype)
        assert ours.run._cache_size() == 1
    return row


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if c.steps == 200 else ()) for n, c in CASES.items()],
)
def test_a_run_is_the_same_in_both_frameworks(name):
    """Every number of every step."""
    case = CASES[name]
    row = run_both(case, case.steps)
    assert row.passed, (row.drifts_from, row.first_over, row.causes)
    assert row.drifts_from is None
    kinds = {*row.drift}
    moments = {"momentum" if row.optimizer in ("sgd", "lars") else "first moment"}
    assert kinds >= {"learning rate", "loss", "gradient norm", "parameter", "average", *moments}
    assert all(len(values) == case.steps for values in row.drift.values())
    ours, theirs = row.losses
    assert len(ours) == len(theirs) == case.steps
    assert np.mean(ours[-20:]) < np.mean(ours[:20])  # it has learnt
    named = {checked.stage.name for checked in row.stages}
    for kind in ("parameter", "average", *moments):
        assert any(each.startswith(kind) for each in named)
    # What was measured leaves a factor of a thousand to the bound.
    assert max(row.drift["loss"]) <= 1e-12
    assert row.worst.value > 0  # rounding: two programs, not one compared with itself


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT, AdamW", "ViT, SGD"])
def test_losses_in_float32(name):
    """AdamW's losses are held over 200 steps; SGD's momentum lets rounding grow."""
    row = run_both(CASES[name], 200, "float32")
    assert row.passed, row.first_over
    assert {c.stage.name for c in row.stages} == {"learning rate", "loss"}
    assert row.drift["loss"][-1] > 0


# -- causes


class Fault(NamedTuple):
    """What both recipes have, what the PyTorch run alone has, what makes the drift vanish, and
    whether it is run always."""

    recipe: Mapping[str, Any]
    changes: Mapping[str, Any]
    said: str
    quick: bool = False


FAULTS = {
    "clipping epsilon": Fault({}, {"clip_rule": "torch"}, "clip_rule = 'exact'", True),
    "no clipping epsilon": Fault(
        {"clip_rule": "torch"},
        {"clip_rule": "exact"},
        "a clipping epsilon of 1e-6, as in torch's clip_grad_norm_ (clip_rule = 'torch')",
    ),
    "clipping": Fault({"clip": None}, {"clip": 1.0}, "clip = None"),
    "no clipping": Fault({}, {"clip": None}, "clip = 1.0"),
    "optax's default decay": Fault(
        {"weight_decay": 1e-2}, {"weight_decay": 1e-4}, "weight_decay = 0.01"
    ),
    "torch's default decay": Fault(
        {"weight_decay": 1e-4}, {"weight_decay": 1e-2}, "weight_decay = 0.0001"
    ),
    "one step ahead": Fault({}, {"schedule_offset": 1}, "schedule_offset = 0", True),
    "one step behind": Fault({}, {"schedule_offset": -1}, "schedule_offset = 0"),
    "epsilon in the root": Fault({}, {"eps_root": 1e-16}, "eps_root = 0.0"),
    "coupled decay": Fault({}, {"coupled_decay": True}, "coupled_decay = False"),
    "tokens decay": Fault({}, {"no_decay": "transformers"}, "no_decay = 'timm'"),
    "tokens do not": Fault(
        {"no_decay": "transformers"}, {"no_decay": "timm"}, "no_decay = 'transformers'"
    ),
    "everything decays": Fault({}, {"no_decay": "none"}, "no_decay = 'timm'"),
    "decay without the layer's rate": Fault({}, {"decay_rate": "schedule"}, "decay_rate = 'layer'"),
    "decay without a rate": Fault({}, {"decay_rate": "nothing"}, "decay_rate = 'layer'"),
    "average's warm-up": Fault({}, {"ema_rule": "warmup"}, "ema_rule = 'plain'"),
    "average before": Fault({}, {"average": "before"}, "average = 'after'"),
    "smoothing": Fault({}, {"smoothing": "others"}, "smoothing = 'all'"),
    "no smoothing": Fault({}, {"label_smoothing": 0.0}, "label_smoothing = 0.1"),
    "final norm": Fault({}, {"layer_decay_rule": "timm"}, "layer_decay_rule = 'mae'"),
    "mean of means": Fault({}, {"accumulation": "mean"}, "accumulation = 'sum'"),
    "bias correction": Fault({}, {"bias_correction": False}, "bias_correction = True"),
    "another b2": Fault({}, {"b2": 0.95}, "b2 = 0.999"),
    "Nesterov": Fault(SGD, {"nesterov": True}, "nesterov = False"),
    "dampening": Fault(SGD, {"dampening": 0.9}, "dampening = 0.0"),
    "float32 rates": Fault({}, {"schedule_dtype": "float32"}, "schedule_dtype = 'float64'"),
    "another schedule": Fault({"warmup_steps": 1}, {"schedule": "linear"}, "schedule = 'cosine'"),
    "frozen": Fault({}, {"train": "classifier"}, "train = 'all'"),
    "two at once": Fault(
        {},
        {"clip_rule": "torch", "schedule_offset": 1},
        "(schedule_offset = 0) and a clipping epsilon of 0, as in optax (clip_rule = 'exact')",
    ),
}


def drifted(recipe, changes, steps=8):
    """Two runs of the twin trainer, one of which has other definitions."""
    recipe = quiet(FULL.replace(steps=steps, **recipe))[0]
    one, other = (network(num_hidden_layers=1) for _ in range(2))
    ours = TorchRun(one, Setup(recipe), steps)
    setup = Setup(recipe).change(**changes)
    return compare_runs(
        ours, other, setup, batches_of(one, steps, 8, recipe.accumulate), steps=steps
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if f.quick else pytest.mark.slow) for n, f in FAULTS.items()],
)
def test_a_definition_that_differs_is_named(name):
    fault = FAULTS[name]
    row = drifted(fault.recipe, fault.changes)
    assert not row.passed
    assert row.drifts_from <= 2
    assert row.agreeing, row.causes
    assert any(fault.said in cause.change for cause in row.agreeing), row.causes
    assert row.agreeing[0].after <= 1e-12 < row.agreeing[0].before


def test_a_drift_of_another_cause_is_not_explained():
    row = drifted({}, {"learning_rate": 1.7e-3}, steps=6)
    assert row.drifts_from == 1
    assert row.first_over.stage.name == "learning rate"
    assert row.causes == []


def test_a_run_that_is_not_finite_does_not_pass():
    row = drifted({"learning_rate": 1e200}, {}, steps=7)
    assert not row.passed
    assert np.isnan(row.losses[0][-1])
    assert np.isnan(row.first_over.value)
    lines = verify_report.remarks(row)
    assert "there it is infinite or no number (NaN)" in lines
    found = Verification("m", None, "vit", "classifier", (8, 8), 8, [row], {})
    table = json.loads(verify_report.as_json(found))
    assert table["rows"][0]["losses"][0][-1] is None
    assert "NaN" in verify_report.html(found)


# -- the biases of keys


def test_biases_of_keys_do_not_matter():
    """Softmax does not see them: in Transformers' model others give the same logits, and their
    gradient is rounding. (Its eager attention takes the softmax in float32.)"""
    config = make_config(**{k: v for k, v in SIZES.items() if k != "drop_path_rate"})
    peer = transformers.ViTForImageClassification(reference_config(config, "sdpa")).double().eval()
    x = torch.tensor(images(config, 4))
    before = peer(x).logits
    before.square().sum().backward()
    named = dict(peer.named_parameters())
    keys = [name for name in named if is_key_bias(name)]
    assert len(keys) == 2
    largest = max(float(p.grad.abs().max()) for p in named.values())
    with torch.no_grad():
        for name in keys:
            assert float(named[name].grad.abs().max()) < 1e-14 * largest
            named[name].add_(torch.randn(16, dtype=torch.float64))
        torch.testing.assert_close(peer(x).logits, before, rtol=0, atol=1e-14)


def test_biases_of_keys_are_judged_apart():
    """They have a bound of their own, and no other parameter has it."""
    row = drifted({}, {}, steps=6)
    loose = {c.stage.name for c in row.stages if c.bound == BOUNDS["training key biases"]}
    assert loose == {
        f"{kind} encoder.layer.0.attention.attention.key.bias" for kind in ("parameter", "average")
    }
    others = {c.bound for c in row.stages if c.stage.name not in loose}
    assert others == {BOUNDS["training float64"]} == {1e-9}


# -- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint."""
    path = tmp_path_factory.mktemp("saved")
    network(num_hidden_layers=1).float().save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_the_command_names_the_definition(saved, tmp_path, capsys):
    page = tmp_path / "r.html"
    arguments = ["verify", saved, "--training", "6", "--batch", "4", "--set", "warmup_steps=2"]
    arguments += ["--torch", "clip_rule=torch", "--set", "clip=0.1", "--report", str(page)]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "6 steps of adamw: loss " in out
    assert "the runs drift apart from step 0 on, first in the first moment " in out
    assert "the drift vanishes if the PyTorch run has a clipping epsilon of 0, as in optax" in out
    assert "the PyTorch run alone has clip_rule = 'torch'" in out
    assert "OUTSIDE bounds" in out
    text = page.read_text()
    assert "Drift by step" in text
    assert "(clip_rule = &#x27;exact&#x27;)" in text


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_the_command_on_runs_that_agree(saved, tmp_path, capsys, suffix):
    report = tmp_path / f"r{suffix}"
    arguments = ["verify", saved, "--training", "5", "--json", "--recipe", "fine-tune"]
    arguments += ["--set", "ema=0.9", "--set", "optimizer=sgd", "--report", str(report)]
    assert main([*arguments, "--dtype", "float64,float32"]) == 0
    table = json.loads(capsys.readouterr().out)
    first, second = table["rows"]
    assert table["passed"]
    assert first["optimizer"] == "sgd"
    assert first["steps"] == len(first["losses"][0]) == len(first["drift"]["average"]) == 5
    assert first["drifts_from"] is None
    assert second["dtype"] == "float32"
    assert [s["stage"]["name"] for s in second["stages"]] == ["learning rate", "loss"]
    text = report.read_text()
    assert json.loads(text) == table if suffix == ".json" else "Training of" in text


@pytest.mark.slow
def test_a_checkpoint_without_a_head(tmp_path):
    network("ViTModel").float().save_pretrained(tmp_path)
    found = verify_training(tmp_path, steps=3, batch=4)
    assert found.passed
    assert found.head == "classifier"
    assert any("no head" in note for note in found.notes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training", "0"], "must be a positive integer"),
        (["--recipe", "fine-tune"], "--recipe is for training runs; add --training STEPS"),
        (["--torch", "eps=1e-6"], "--torch is for training runs; add --training STEPS"),
        (["{m}", "--training", "2"], "given a second model too"),
        (["--training", "2", "--gradients"], "given --gradients too"),
        (["--training", "2", "--image-size", "16"], "given --image-size too"),
        (["--training", "2", "--dtype", "bfloat16"], "float64 or float32; given bfloat16"),
        (["--training", "2", "--recipe", "nope"], "no recipe 'nope'"),
        (["--training", "2", "--torch", "eps_rot=1"], "Did you mean eps_root?"),
        (["--training", "2", "--torch", "eps_root"], "a change must be NAME=VALUE"),
        (["--training", "2", "--torch", "smoothing=some"], "must be one of all, others"),
        (["--training", "2", "--torch", "schedule_offset=a"], "must be an integer; given 'a'"),
        (["--training", "2", "--torch", "coupled_decay=3"], "must be true or false; given 3"),
        (["--training", "2", "--set", "optimizer=muon"], "the recipe has muon"),
        (["--training", "2", "--set", "lora=4"], "no adapters"),
        (["--training", "2", "--set", "accumulate=3"], "must be a multiple of `accumulate`"),
        (["--training", "2", "--batch", "3", "--set", "accumulate=2"], "cannot be run in 2 equal"),
        (["--training", "2", "--torch", "lr=-1"], "learning_rate"),
        (["--training", "2", "--set", "no_such=3"], "no configuration has a field 'no_such'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(saved, arguments, said, capsys):
    given = [argument.replace("{m}", saved) for argument in arguments]
    assert main(["verify", saved, *given]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


# -- Transformers' Trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs, of accelerate and torch
def test_the_run_of_transformers_trainer(tmp_path, monkeypatch):
    """20 steps of its own optimizer, schedule, clipping and decay, in float64: both of ours."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    steps, batch = 20, 4
    model = network()
    config = model.config
    peer = transformers.ViTForImageClassification(reference_config(config, "sdpa")).double()
    peer.load_state_dict(model.state_dict())
    batches = list(batches_of(model, steps, batch)())
    data = [
        {"pixel_values": torch.tensor(x), "labels": int(y)}
        for each in batches
        for x, y in zip(each["pixel_values"], each["labels"], strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_steps=6,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )

    class InOrder(transformers.Trainer):
        losses: list[float] = []  # noqa: RUF012

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(data)

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            return loss

    InOrder(peer, arguments, train_dataset=data).train()
    recipe = Recipe(
        learning_rate=1e-3,
        weight_decay=0.05,
        no_decay="transformers",
        clip=1.0,
        clip_rule="torch",
        schedule="linear",
        warmup_steps=6,
        label_smoothing=0.0,
    )
    weights = {name: np.array(p.detach()) for name, p in model.named_parameters()}
    twin = fine_tune(model, batches, recipe)
    with jax.enable_x64(True):
        ours = FlaxRun(
            flax_twin(vit_flax.FlaxViTForImageClassification, config, weights, jnp.float64),
            recipe,
            steps,
        )
        flax = [ours.step(each) for each in batches]
        after = {name: np.array(array) for name, array in ours.state()["parameter"].items()}
    assert len(InOrder.losses) == steps
    for found in (twin, flax):
        losses = [row["loss"] for row in found]
        np.testing.assert_allclose(losses, InOrder.losses, rtol=0, atol=1e-12)
    for name, wanted in peer.named_parameters():
        atol = 1e-8 if is_key_bias(name) else 1e-12
        for got in (after[name.removeprefix("vit.")], dict(model.named_parameters())[name]):
            np.testing.assert_allclose(
                got if isinstance(got, np.ndarray) else got.detach(),
                wanted.detach(),
                rtol=0,
                atol=atol,
                err_msg=name,
            )
