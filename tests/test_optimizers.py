"""Optimizers, schedules and parameter groups of recipes beside torch, timm, optax and Transformers.

Gradients are given, so no network runs: only the arithmetic of the update is compared.
"""

from __future__ import annotations

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import SMALL
from timm_models import timm
from transformers.trainer_pt_utils import get_parameter_names

import vit_flax
from vit_common.errors import InputError
from vit_common.recipes import learning_rates, recipe
from vit_flax import stack_layers
from vit_flax.training import explain, make_optimizer, schedule_of, trainable_of

optim, scheduler = (importlib.import_module(f"timm.{name}") for name in ("optim", "scheduler"))

STEPS = 20
SHAPES = {
    "vit/embeddings/cls_token": (1, 1, 6),
    "vit/encoder/layer/0/output/dense/kernel": (8, 6),
    "vit/encoder/layer/0/output/dense/bias": (6,),
    "vit/encoder/layer/1/output/dense/kernel": (8, 6),
    "vit/encoder/layer/1/output/dense/bias": (6,),
    "vit/layernorm/scale": (6,),
    "classifier/kernel": (6, 3),
    "classifier/bias": (3,),
}


def arrays(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}


def ours(settings, stacked=False):
    """Parameters after STEPS updates with given gradients, by path."""
    tree = unflatten_dict({tuple(n.split("/")): jnp.asarray(a) for n, a in arrays(0).items()})
    gradients = [
        unflatten_dict({tuple(n.split("/")): jnp.asarray(a) for n, a in arrays(1 + i, 0.5).items()})
        for i in range(STEPS)
    ]
    if stacked:
        tree, gradients = stack_layers(tree), [stack_layers(each) for each in gradients]
    optimizer = make_optimizer(settings, tree, steps=STEPS)

    @jax.jit
    def update(tree, state, gradient):
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    state = optimizer.init(tree)
    for gradient in gradients:
        tree, state = update(tree, state, gradient)
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def theirs(make, rates=None, clip=None, groups=None):
    """The same by an optimizer of torch."""
    parameters = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in arrays(0).items()}
    chosen = [{"params": list(parameters.values())}]
    if groups is not None:
        chosen = [{"params": [p], **groups(name)} for name, p in parameters.items()]
    optimizer = make(chosen)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for i in range(STEPS):
        for name, gradient in arrays(1 + i, 0.5).items():
            parameters[name].grad = torch.tensor(gradient)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak if rates is None else peak * rates[i]
        optimizer.step()
    return {name: p.detach().numpy() for name, p in parameters.items()}


FLAT = {
    "layer_decay": None,
    "schedule": "constant",
    "warmup_steps": 0,
    "clip": None,
    "no_decay": "none",
    "steps": STEPS,
}
ADAMW = {"learning_rate": 1e-2, "weight_decay": 0.1, "b2": 0.98}
SGD = {"optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0}
# name -> settings of the recipe, torch's optimizer, its clipping
OPTIMIZERS = {
    "adamw": (
        ADAMW,
        lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.98), weight_decay=0.1),
        None,
    ),
    "sgd": (SGD, lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9), None),
    "nesterov": (
        {**SGD, "nesterov": True},
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
        None,
    ),
    "clipped": (
        {**SGD, "clip": 0.5, "clip_rule": "torch"},
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        0.5,
    ),
    "lion": (
        {"optimizer": "lion", "learning_rate": 1e-3, "weight_decay": 0.1, "b2": 0.99},
        lambda p: optim.Lion(p, 1e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=False),
        None,
    ),
    "lamb": (
        {**ADAMW, "optimizer": "lamb", "b2": 0.999, "eps": 1e-6},
        lambda p: optim.Lamb(p, 1e-2, eps=1e-6, weight_decay=0.1, max_grad_norm=None),
        None,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch(name):
    settings, make, clip = OPTIMIZERS[name]
    with jax.enable_x64(True):
        found = ours(recipe(**{**FLAT, **settings}))
    for path, wanted in theirs(make, clip=clip).items():
        np.testing.assert_allclose(found[path], wanted, rtol=0, atol=2e-14, err_msg=path)


def test_lars_is_that_of_mae_and_timm():
    """Matrices by timm's `Lars`, whose rule for them MAE has too; vectors as plain SGD."""

    def groups(name):
        return {"trust_coeff": 1e-3, "always_adapt": len(SHAPES[name]) > 1}

    settings = {**SGD, "optimizer": "lars", "learning_rate": 0.1}
    with jax.enable_x64(True):
        found = ours(recipe(**{**FLAT, **settings}))
    wanted = theirs(lambda p: optim.Lars(p, 0.1, momentum=0.9, eps=0.0), groups=groups)
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-14, err_msg=path)


def test_muon_is_that_of_optax():
    """For matrices of the blocks; for everything else AdamW, as there."""
    numbers = optax.contrib.MuonDimensionNumbers()
    tree = unflatten_dict({tuple(n.split("/")): jnp.asarray(a) for n, a in arrays(0).items()})
    kinds = unflatten_dict(
        {tuple(n.split("/")): numbers if "layer/" in n and "kernel" in n else None for n in SHAPES}
    )
    optimizer = optax.contrib.muon(
        1e-2, beta=0.9, nesterov=True, muon_weight_dimension_numbers=kinds
    )
    with jax.enable_x64(False):
        found = ours(
            recipe(**{**FLAT, "optimizer": "muon", "learning_rate": 1e-2, "weight_decay": 0.0})
        )
        state = optimizer.init(tree)
        for i in range(STEPS):
            gradient = unflatten_dict(
                {tuple(n.split("/")): jnp.asarray(a) for n, a in arrays(1 + i, 0.5).items()}
            )
            updates, state = jax.jit(optimizer.update)(gradient, state, tree)
            tree = optax.apply_updates(tree, updates)
    moved = 0
    for path, leaf in flatten_dict(tree).items():
        if "layer" in path and path[-1] == "kernel":
            moved += 1
            np.testing.assert_allclose(found["/".join(path)], leaf, rtol=0, atol=1e-4)
    assert moved == 2


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars", "muon"])
def test_stacked_blocks_take_the_same_updates(optimizer):
    """Layer-wise rates, weight decay, norms and matrices are those of each block by itself."""
    settings = recipe(
        steps=STEPS, warmup_steps=2, optimizer=optimizer, layer_decay=0.5, learning_rate=1e-2
    )
    single, stacked = ours(settings), ours(settings, stacked=True)
    for path, value in stacked.items():
        wanted = single.get(path)
        if wanted is None:
            wanted = np.stack([single[path.replace("stacked", str(i))] for i in range(2)])
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6, err_msg=path)


def test_the_first_steps_are_as_exact_in_float32():
    """1 - 0.999 in float32 has four digits left; a first step of Adam is the rate exactly."""
    found = ours(recipe(**{**FLAT, "learning_rate": 1e-2, "weight_decay": 0.0, "b2": 0.9999}))
    wanted = theirs(lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.9999), weight_decay=0.0))
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-6, err_msg=path)


# -- learning rates


def rates_of(scheduler_of, steps, peak=0.1):
    """What a scheduler of torch, timm or Transformers gives an optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    its = scheduler_of(optimizer)
    found = []
    for i in range(steps):
        if isinstance(its, scheduler.CosineLRScheduler):
            its.step(i // 5)  # five steps in an epoch
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not isinstance(its, scheduler.CosineLRScheduler):
            its.step()
    return found


def timm_cosine(optimizer):
    return scheduler.CosineLRScheduler(
        optimizer, t_initial=10, lr_min=1e-3, warmup_t=3, warmup_lr_init=1e-4
    )


SCHEDULES = {
    "linear, warm-up": (
        {"schedule": "linear", "warmup_steps": 7, "steps": 50},
        lambda o: transformers.get_linear_schedule_with_warmup(o, 7, 50),
    ),
    "cosine, warm-up": (
        {"schedule": "cosine", "warmup_steps": 7, "steps": 50},
        lambda o: transformers.get_cosine_schedule_with_warmup(o, 7, 50),
    ),
    "constant, warm-up": (
        {"schedule": "constant", "warmup_steps": 7, "steps": 50},
        lambda o: transformers.get_constant_schedule_with_warmup(o, 7),
    ),
    "cosine to a rate": (
        {"schedule": "cosine", "warmup_steps": 0, "steps": 50, "final_learning_rate": 0.01},
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.01),
    ),
    "timm's, by epochs": (
        {
            "schedule": "cosine",
            "epochs": 10,
            "warmup_epochs": 3,
            "warmup_learning_rate": 1e-4,
            "final_learning_rate": 1e-3,
            "warmup_prefix": False,
            "schedule_by": "epoch",
        },
        timm_cosine,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_torch_transformers_and_timm(name):
    settings, its = SCHEDULES[name]
    settings = recipe(learning_rate=0.1, **{"warmup_learning_rate": 0.0, **settings})
    wanted = rates_of(its, 50)
    np.testing.assert_allclose(learning_rates(settings, 50), wanted, rtol=0, atol=1e-16)
    with jax.enable_x64(True):
        rate = schedule_of(settings, 50)
        np.testing.assert_allclose([rate(i) for i in range(50)], wanted, rtol=0, atol=1e-16)
        assert rate(1000) == rate(49)


def test_the_rate_grows_with_the_batch_and_its_ends_do_not():
    """As in DeiT's and MAE's code."""
    rates = learning_rates(
        recipe("deit", batch_size=256, schedule_by="step", final_learning_rate=1e-5), 3000
    )
    assert rates[0] == 1e-6
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)
    assert rates.max() == pytest.approx(5e-4 * 256 / 512, rel=1e-2)


# -- which parameters, how fast, with which decay

BEIT = {"use_relative_position_bias": True, "use_mean_pooling": True}
FAMILIES = {
    "vit": ("ViTForImageClassification", {}),
    "deit": ("DeiTForImageClassificationWithTeacher", {}),
    "beit": ("BeitForImageClassification", BEIT),
    "beit, shared": (
        "BeitForImageClassification",
        {
            "use_shared_relative_position_bias": True,
            "use_mean_pooling": False,
            "use_absolute_position_embeddings": True,
            "use_relative_position_bias": False,
        },
    ),
    "dinov2": ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersForImageClassification", {}),
}


def family(name):
    """Our model without parameters, and Transformers' class and configuration."""
    cls, fields = FAMILIES[name]
    fields = {**SMALL, **fields}
    ours = getattr(vit_flax, f"Flax{cls}")
    theirs = getattr(transformers, cls)
    config = ours.config_class(**{k: v for k, v in fields.items() if k != "encoder_stride"})
    return ours(config, _do_init=False), theirs, config


def in_timm(path):
    """timm's name of a parameter."""
    name = re.sub(r"^(vit|deit|beit|dinov2|dinov2_with_registers)\.", "", path.replace("/", "."))
    for ours, its in (
        (r"\.(kernel|scale)$", ".weight"),
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.distillation_token", "dist_token"),
        (r"^embeddings\.register_tokens", "reg_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^encoder\.layer\.", "blocks."),
        (r"^encoder\.relative_position_bias", "rel_pos_bias"),
        (r"attention\.attention\.relative_position_bias", "attn"),
        (r"attention\.attention\.(query|key|value)", "attn.qkv"),
        (r"attention\.output\.dense", "attn.proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(?<=\d)\.output\.dense", ".mlp.fc2"),
        (r"\.layernorm_before", ".norm1"),
        (r"\.layernorm_after", ".norm2"),
        (r"^layernorm", "norm"),
        (r"^pooler\.layernorm", "fc_norm"),
        (r"lambda_", "gamma_"),
        (r"^(cls_)?classifier", "head"),
        (r"^distillation_classifier", "head_dist"),
    ):
        name = re.sub(ours, its, name)
    return re.sub(r"attn\.qkv\.bias", "attn.q_bias", name) if "beit" in path else name


def timm_groups(name):
    """Factor of the rate and weight decay by timm's name."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    sizes["num_classes"] = 5
    if name == "deit":
        network = timm.models.deit.VisionTransformerDistilled(**sizes)
    elif name.startswith("beit"):
        shared = "shared" in name
        network = timm.models.beit.Beit(
            **sizes,
            global_pool="token" if shared else "avg",
            init_values=0.1,
            use_abs_pos_emb=shared,
            use_rel_pos_bias=not shared,
            use_shared_rel_pos_bias=shared,
        )
    else:
        registers = 4 if name == "registers" else 0
        network = timm.models.VisionTransformer(**sizes, reg_tokens=registers)
    groups = optim.param_groups_layer_decay(
        network, 0.05, network.no_weight_decay(), layer_decay=0.5
    )
    names = {id(p): n for n, p in network.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["vit", "deit", "beit", "beit, shared", "registers"])
def test_groups_are_those_of_timm(name):
    model, _, _ = family(name)
    wanted = timm_groups(name)
    settings = recipe(layer_decay=0.5, layer_decay_rule="timm", no_decay="timm")
    compared = set()
    for row in explain(settings, model):
        its = in_timm(row.name)
        if its not in wanted and re.search(r"mask_token|lambda_|pooler", row.name):
            continue  # timm's networks here have none
        assert (row.rate, row.decay) == wanted[its], row.name
        compared.add(its)
    left = {each for each in wanted if each not in compared}
    assert left <= {each for each in wanted if "v_bias" in each}


def test_groups_are_those_of_mae_and_beit():
    """Layer-wise rates with depth 3 and decay 0.5, as their `lr_decay.py` and `optim_factory.py`
    give them: the final norm and the head have the full rate."""
    config = vit_flax.ViTConfig(**{**SMALL, "num_hidden_layers": 3})
    model = vit_flax.FlaxViTForImageClassification(config, _do_init=False)
    rows = {row.name: row for row in explain(recipe(layer_decay=0.5), model)}
    for name, rate in {
        "vit/embeddings/cls_token": 0.0625,
        "vit/embeddings/position_embeddings": 0.0625,
        "vit/embeddings/patch_embeddings/projection/kernel": 0.0625,
        "vit/encoder/layer/0/layernorm_before/scale": 0.125,
        "vit/encoder/layer/1/output/dense/bias": 0.25,
        "vit/encoder/layer/2/attention/attention/query/kernel": 0.5,
        "vit/layernorm/scale": 1.0,
        "classifier/kernel": 1.0,
    }.items():
        assert rows[name].rate == rate
    rows = {row.name: row for row in explain(recipe(layer_decay=0.5), family("beit, shared")[0])}
    assert rows["beit/encoder/relative_position_bias/relative_position_bias_table"].rate == 1.0
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), model.params_shape_tree)
    rows = explain(recipe(layer_decay=0.5), stack_layers(zeros))
    found = {row.name: row.rate for row in rows}
    assert found["vit/encoder/layer/stacked/output/dense/bias"] == (0.125, 0.25, 0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_decay_is_that_of_the_trainer_of_transformers(name):
    model, cls, config = family(name)
    reference = cls(cls.config_class(**config.to_dict()))
    # What `Trainer.get_decay_parameter_names` calls it with.
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    wanted = set(get_parameter_names(reference, [torch.nn.LayerNorm], patterns))
    everything = {n for n, _ in reference.named_parameters()}
    compared = set()
    for row in explain(recipe("hf", weight_decay=0.1), model):
        its = re.sub(r"/(kernel|scale)$", "/weight", row.name).replace("/", ".")
        if its not in everything:
            its = in_transformers(its, "swiglu" if config.use_swiglu_ffn else "plain")
        assert its in everything, its
        assert (row.decay > 0) == (its in wanted), row.name
        compared.add(its)
    assert everything - compared <= {"dinov2.embeddings.mask_token"}


def in_transformers(name, mlp):
    """Names of DINOv2's parts in Transformers."""
    first, second = {"swiglu": ("weights_in", "weights_out"), "plain": ("fc1", "fc2")}[mlp]
    for ours, its in (
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_1", "layer_scale1.lambda1"),
        ("lambda_2", "layer_scale2.lambda1"),
        (r"intermediate\.dense", f"mlp.{first}"),
        (r"(?<=\d)\.output\.dense", f".mlp.{second}"),
    ):
        name = re.sub(ours, its, name)
    return name


def test_what_trains():
    model, _, _ = family("vit")

    def trained(**settings):
        rows = explain(recipe(**settings), model)
        return {row.name for row in rows if row.trained}

    everything = trained()
    assert len(everything) == len(flatten_dict(model.params_shape_tree))
    assert trained(train="head") == {"classifier/kernel", "classifier/bias"}
    last = {name for name in everything if "/layer/1/" in name}
    assert trained(train=r"layer\.1\.") == trained(train="layer/1/") == last
    # Named as in PyTorch too.
    assert trained(train=r"classifier\.weight") == {"classifier/kernel"}
    with pytest.raises(InputError, match=r"no parameter matches 'blocks'; one is "):
        trainable_of(recipe(train="classifier,blocks"), model)
    with pytest.raises(InputError, match=r"'\(' is not a regular expression"):
        trainable_of(recipe(train="("))
    with pytest.raises(InputError, match="given nothing"):
        trainable_of(recipe(train=","))


def test_frozen_parameters_have_no_moments():
    tree = unflatten_dict({tuple(n.split("/")): jnp.asarray(a) for n, a in arrays(0).items()})
    settings = recipe(train="head", steps=4)
    optimizer = make_optimizer(settings, tree, steps=4, trainable=trainable_of(settings))
    state = optimizer.init(tree)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(leaf.shape for leaf in moments) == [(3,), (3,), (6, 3), (6, 3)]
    updates, _ = jax.jit(optimizer.update)(tree, state, tree)
    still = flatten_dict(updates)
    assert not np.any(still["vit", "layernorm", "scale"])
