"""The fields that say what a block and the network around it are made of, against timm 1.0.31's
networks: both twins, and the numpy network that proves conversions."""

from __future__ import annotations

import importlib
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from networks import InMemory, flax_twin, images, random_weights, torch_twin
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.recipes import Recipe
from vit_convert import convert
from vit_convert.forward import forward
from vit_flax.training.optimizers import explain
from vit_torch.training import settings

optim = importlib.import_module("timm.optim")
vit = timm.models.vision_transformer

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}
TIMM = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 1.5,
    "img_size": 16,
    "patch_size": 8,
    "num_classes": 5,
}
RMS = partial(timm.layers.RmsNorm, eps=1e-6)
GATED = {
    "mlp_layer": partial(timm.layers.GluMlp, gate_last=False),
    "act_layer": torch.nn.SiLU,
    "mlp_ratio": 64 / 24,
}
QK = {"qk_norm": True}
CLOSE = 1e-11
"""Largest difference of two networks in float64, whose logits are about one."""

# name -> fields of ours, arguments of timm's VisionTransformer
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all norms, gated": (
        {
            "use_patch_bias": False,
            "use_pre_norm": True,
            "use_qk_norm": True,
            "use_attention_norm": True,
            "use_mlp_norm": True,
            "use_swiglu_ffn": True,
            "intermediate_size": 32,
        },
        {"pre_norm": True, **QK, "scale_attn_norm": True, "scale_mlp_norm": True, **GATED},
    ),
    "parallel, as published": (
        {
            "block_type": "parallel",
            "norm_type": "rmsnorm",
            "use_qk_norm": True,
            "qkv_bias": False,
        },
        {"block_fn": vit.ParallelScalingBlock, "norm_layer": RMS, "qkv_bias": False, **QK},
    ),
    "norms after": ({"block_type": "post_norm"}, {"block_fn": vit.ResPostBlock}),
    "two branches, no final norm": (
        {"num_parallel_branches": 2, "layer_scale_init_value": 0.5, "use_final_norm": False},
        {"block_fn": vit.ParallelThingsBlock, "init_values": 0.5, "final_norm": False},
    ),
    "norm before the blocks": (
        {"use_patch_bias": False, "use_pre_norm": True},
        {"pre_norm": True},
    ),
    "norms of query and key": ({"use_qk_norm": True}, QK),
    "norm of the heads": ({"use_attention_norm": True}, {"scale_attn_norm": True}),
    "norm in the MLP": ({"use_mlp_norm": True}, {"scale_mlp_norm": True}),
    "rms norms": ({"norm_type": "rmsnorm"}, {"norm_layer": RMS}),
    "parallel": (
        {"block_type": "parallel", "layer_scale_init_value": 0.5},
        {"block_fn": vit.ParallelScalingBlock, "init_values": 0.5},
    ),
    "three branches": (
        {"num_parallel_branches": 3, "use_qk_norm": True},
        {"block_fn": partial(vit.ParallelThingsBlock, num_parallel=3), **QK},
    ),
}
NOT_TIMMS: dict[str, dict[str, Any]] = {
    "parallel, gated": {"block_type": "parallel", "use_swiglu_ffn": True},
    "three branches": {"num_parallel_branches": 3},
    "norms after, with layer scale": {"block_type": "post_norm", "layer_scale_init_value": 0.1},
    "a bias of the key alone": {"qkv_bias": False, "use_key_bias": True},
    "no such activation": {"hidden_act": "linear"},
    "a norm before the blocks beside a bias": {"use_pre_norm": True},
}
UNWRITTEN = (
    "all norms, gated",  # timm is told of a gated MLP by a name alone
    *(kind for kind in KINDS if "parallel" in kind or "branches" in kind),
)
NAMES = (  # ours, timm's
    (r"/", "."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"^vit\.", ""),
    (r"attention\.attention\.(query|key|value)\.", "attn.qkv."),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"attention\.attention\.query_norm", "attn.q_norm"),
    (r"attention\.attention\.key_norm", "attn.k_norm"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"attention\.output\.layernorm", "attn.norm"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"output\.layernorm", "mlp.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_(.)", r"ls\1.gamma"),
    (r"encoder\.layer\.", "blocks."),
    (r"pre_layernorm", "norm_pre"),
    (r"^layernorm", "norm"),
    (r"classifier", "head"),
)
PARALLEL_NAMES = (  # then of a block of one norm
    (r"norm1", "in_norm"),
    (r"ls1", "ls"),
    (r"attn\.(.)_norm", r"\1_norm"),
    (r"attn\.proj", "attn_out_proj"),
    (r"mlp\.fc2", "mlp_out_proj"),
    (r"attn\.qkv", "in_proj"),
)
BRANCH_NAMES = (  # or of a block of several branches
    (r"(blocks\.\d+)\.(?!branch)", r"\1.branch.0."),
    (r"branch\.(\d+)\.norm1", r"attns.\1.norm"),
    (r"branch\.(\d+)\.norm2", r"ffns.\1.norm"),
    (r"branch\.(\d+)\.ls1", r"attns.\1.ls"),
    (r"branch\.(\d+)\.ls2", r"ffns.\1.ls"),
    (r"branch\.(\d+)\.attn", r"attns.\1.attn"),
    (r"branch\.(\d+)\.mlp", r"ffns.\1.mlp"),
)


def name_in_timm(name: str, config: ViTConfig) -> str:
    """timm's name of one of our parameters."""
    names = (*NAMES, *(PARALLEL_NAMES if config.block_type == "parallel" else ()))
    if config.num_parallel_branches > 1:
        names += BRANCH_NAMES
    for ours, theirs in names:
        name = re.sub(ours, theirs, name)
    # There query, key and value have no bias, and the MLP beside them has its own.
    return name.replace("mlp.fc1.bias", "mlp_bias") if config.block_type == "parallel" else name


def peer_state(config: ViTConfig, weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Our weights under timm's names."""
    parallel = config.block_type == "parallel"
    first = r"(.*)(attention\.attention\.)(query)\.(weight|bias)"
    fused = {}
    for name in weights:
        if match := re.fullmatch(first, name):
            start, attention, _, leaf = match.groups()
            parts = [f"{start}{attention}{part}.{leaf}" for part in ("query", "key", "value")]
            if parallel:
                parts.insert(0, f"{start}intermediate.dense.{leaf}")
            fused[f"{start}attn.qkv.{leaf}"] = parts
    gone = {part for parts in fused.values() for part in parts}
    flat = {name: weights[name] for name in weights if name not in gone}
    flat |= {name: np.concatenate([weights[p] for p in parts]) for name, parts in fused.items()}
    return {name_in_timm(name, config): torch.tensor(value) for name, value in flat.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_twins_and_the_numpy_network_are_timms(kind):
    fields, arguments = KINDS[kind]
    config = ViTConfig(**{**SIZES, **fields})
    weights = random_weights(config, "classifier")
    x = images(config)
    peer = timm.models.VisionTransformer(**{**TIMM, **arguments}).double().eval()
    peer.load_state_dict(peer_state(config, weights))
    with torch.no_grad():
        want = peer(torch.tensor(x)).numpy()
        twin = torch_twin(vit_torch.ViTForImageClassification, config, weights, torch.float64)
        got = twin(torch.tensor(x)).logits.numpy()
    assert np.abs(got - want).max() < CLOSE
    with jax.enable_x64(True):
        cls = vit_flax.FlaxViTForImageClassification
        model = flax_twin(cls, config, weights, jnp.float64).with_front_tokens(1)
        got = np.asarray(model(x).logits)
    assert np.abs(got - want).max() < CLOSE
    tensors = {name.removeprefix("vit."): InMemory(value) for name, value in weights.items()}
    assert np.abs(forward(config, tensors, x[0]) - want[0]).max() < 1e-5  # its erf has 3e-7


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*NOT_TIMMS, *UNWRITTEN)])
def test_timm_builds_what_is_written_for_it(kind, tmp_path):
    config = ViTConfig(**{**SIZES, **KINDS[kind][0]})
    twin = torch_twin(
        vit_torch.ViTForImageClassification, config, random_weights(config, "classifier")
    )
    twin.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    x = torch.tensor(images(config), dtype=torch.float32)
    with torch.no_grad():
        assert (peer(x) - twin(x).logits).abs().max() < 2e-5
    again = vit_torch.ViTForImageClassification.from_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(again[name], value) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"block_type": "post_norm"},
        {"norm_type": "rmsnorm"},
        {"use_final_norm": False},
        {"use_patch_bias": False},
    ],
)
@pytest.mark.parametrize("to", ["torchvision", "dino"])
def test_other_projects_have_no_such_networks(to, fields, tmp_path):
    config = ViTConfig(**{**SIZES, **fields})
    vit_torch.ViTForImageClassification(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=next(iter(fields))):
        convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("kind", NOT_TIMMS)
def test_what_no_name_of_timms_has_is_not_written(kind, tmp_path):
    fields = NOT_TIMMS[kind]
    config = ViTConfig(**{**SIZES, **fields})
    model = vit_torch.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="timm"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="timm")
    assert not (tmp_path / "theirs").exists()


def test_the_key_bias_by_itself():
    """A key's bias adds the same to all scores of a query, so a network without one is timm's with
    any."""
    config = ViTConfig(**{**SIZES, "use_key_bias": False})
    weights = random_weights(config, "classifier")
    x = images(config)
    peer = timm.models.VisionTransformer(**TIMM).double().eval()
    keys = {f"vit.encoder.layer.{i}.attention.attention.key.bias": np.ones(24) for i in range(2)}
    peer.load_state_dict(peer_state(config, weights | keys))
    with torch.no_grad():
        want = peer(torch.tensor(x)).numpy()
        twin = torch_twin(vit_torch.ViTForImageClassification, config, weights, torch.float64)
        assert np.abs(twin(torch.tensor(x)).logits.numpy() - want).max() < CLOSE
    assert not any("key.bias" in name for name in weights)


def groups_of_timm(name: str) -> dict[str, tuple[float, float]]:
    """Factor of the learning rate and weight decay of each parameter, by timm's name."""
    network = timm.models.VisionTransformer(**{**TIMM, **KINDS[name][1]})
    groups = optim.param_groups_layer_decay(
        network, 0.05, network.no_weight_decay(), layer_decay=0.5
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("kind", ["all norms, gated", "two branches, no final norm"])
def test_rates_and_decay_of_the_parameters_are_timms(kind):
    config = ViTConfig(**{**SIZES, **KINDS[kind][0]})
    want = groups_of_timm(kind)
    run = Recipe(layer_decay=0.5, layer_decay_rule="timm", no_decay="timm", weight_decay=0.05)
    model = vit_flax.FlaxViTForImageClassification(config, _do_init=False)
    ours = {name_in_timm(row.name, config): (row.rate, row.decay) for row in explain(run, model)}
    assert ours == want
    twin = settings(run, vit_torch.ViTForImageClassification(config))
    assert {name_in_timm(n, config): (s.scale, s.decay) for n, s in twin.items()} == want


@pytest.mark.slow  # accelerate takes seconds to import
@pytest.mark.parametrize("kind", ["all norms, gated", "parallel, as published"])
def test_decay_by_transformers_is_that_of_its_trainer(kind):
    config = ViTConfig(**{**SIZES, **KINDS[kind][0]})
    model = vit_torch.ViTForImageClassification(config)
    want = set(transformers.Trainer.get_decay_parameter_names(None, model))
    run = Recipe(no_decay="transformers", weight_decay=0.1)
    assert {name for name, setting in settings(run, model).items() if setting.decay} == want
    ours = vit_flax.FlaxViTForImageClassification(config, _do_init=False)
    leaves = {"kernel": "weight", "scale": "weight"}
    found = set()
    for row in explain(run, ours):
        *path, leaf = row.name.split("/")
        if row.decay:
            found.add(".".join([*path, leaves.get(leaf, leaf)]))
    assert found == want
