"""Files as their authors' code writes them, against the authors' own forward pass: the models of
torchvision, timm and Transformers, and Google's written out. Every parameter is random."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import serialization
from flax.traverse_util import unflatten_dict
from peers import (
    FLOAT32,
    FLOAT64,
    RESIZED,
    assert_close,
    load_flax,
    pixels,
    randomise,
    run_flax,
    run_peer,
    run_torch,
)
from test_convert_google import google_forward, google_weights
from timm_models import timm

import vit_torch
from vit_common.errors import CheckpointError
from vit_convert.convert import convert
from vit_convert.formats import google, mae, moco
from vit_flax import FlaxAutoModelForImageClassification

HEADS = {"num_attention_heads": 4}


def assert_reads(path: Path, hub: Path, want: np.ndarray, x: np.ndarray, **options: Any) -> None:
    """The file itself and its conversion, in both twins."""
    assert_close(run_torch(path, x, **options), want, FLOAT64)
    assert_close(run_torch(hub, x), want, FLOAT64)
    assert_close(run_flax(load_flax(path, **options), x), want, FLOAT32)
    assert_close(run_flax(load_flax(hub), x), want, FLOAT32)


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# -- torchvision

TORCHVISION = {
    "vit_b": {},
    "pre_logits": {"representation_size": 40},
    "no 13": {"old": True},
}


def make_torchvision(**more: Any) -> torch.nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 48,
        "mlp_dim": 80,
        "num_classes": 7,
    }
    model = randomise(VisionTransformer(**{**sizes, **more}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln" in name and name.endswith("weight"):
                parameter.mul_(0.2).add_(1.0)
    return model


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, tmp_path):
    case = dict(TORCHVISION[name])
    old = case.pop("old", False)
    model = make_torchvision(**case)
    state = model.state_dict()
    path = tmp_path / "vit_b_16-c867db91.pth"
    names = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"} if old else {}
    spelled = {}
    for key, value in state.items():
        for new, before in names.items():
            key = key.replace(new, before)
        spelled[key] = value
    torch.save(spelled, path)
    report = convert(path, tmp_path / "hub", overrides=HEADS)
    assert report.format_from == "torchvision"
    x = pixels()
    want = run_peer(copy.deepcopy(model).double(), x)
    assert_reads(path, tmp_path / "hub", want, x, **HEADS)
    convert(tmp_path / "hub", tmp_path / "again.pth", to="torchvision")
    same_state(torch.load(tmp_path / "again.pth", weights_only=True), state)


@pytest.mark.parametrize("size", [48, 16])
def test_positions_of_torchvision_are_resampled_as_torchvision_does(size, tmp_path):
    from torchvision.models.vision_transformer import interpolate_embeddings

    model = make_torchvision()
    path = tmp_path / "vit.pth"
    torch.save(model.state_dict(), path)
    resampled = interpolate_embeddings(size, 8, copy.deepcopy(model.state_dict()))
    larger = make_torchvision(image_size=size)
    larger.load_state_dict(resampled)
    convert(path, tmp_path / "hub", image_size=size, overrides=HEADS)
    x = pixels((size, size))
    want = run_peer(larger.double(), x)
    assert_close(run_torch(tmp_path / "hub", x), want, RESIZED)
    assert_close(run_flax(load_flax(path, **HEADS), x), want, RESIZED * 2)


# -- DeiT-III, MoCo v3, iBOT, MAE's linear probe: timm's models under the authors' names


def small(architecture: str = "vit_tiny_patch16_224", **more: Any) -> torch.nn.Module:
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32, "patch_size": 8}
    return randomise(timm.create_model(architecture, **{**sizes, "num_classes": 7, **more}))


def test_deit_iii(tmp_path):
    model = small("deit3_small_patch16_224")
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in model.state_dict().items()
    }
    assert state["pos_embed"].shape == (1, 16, 48)  # the class token has none
    path = tmp_path / "deit_3_small_224_1k.pth"
    torch.save({"model": state}, path)
    report = convert(path, tmp_path / "hub", overrides=HEADS)
    assert (report.format_from, report.describes) == ("deit", "facebookresearch DeiT-III")
    x = pixels()
    assert_reads(path, tmp_path / "hub", run_peer(copy.deepcopy(model).double(), x), x, **HEADS)
    convert(tmp_path / "hub", tmp_path / "again.pth", to="deit")
    same_state(torch.load(tmp_path / "again.pth", weights_only=True)["model"], state)


def moco_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As `main_moco.py` of facebookresearch/moco-v3 saves it."""
    state = {f"module.base_encoder.{n}": v for n, v in model.state_dict().items()}
    state |= {f"module.momentum_encoder.{n}": v + 1 for n, v in model.state_dict().items()}
    for encoder in ("base", "momentum"):
        state[f"module.{encoder}_encoder.head.0.weight"] = torch.ones(64, 48)
        state[f"module.{encoder}_encoder.head.1.running_mean"] = torch.ones(64)
        state[f"module.{encoder}_encoder.head.3.weight"] = torch.ones(8, 64)
    state["module.predictor.0.weight"] = torch.ones(64, 8)
    return state


def test_moco_v3_is_its_base_encoder(tmp_path):
    model = small(num_classes=0)
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": moco_state(model)}, path)
    report = convert(path, tmp_path / "hub", overrides=HEADS)
    assert report.format_from == "mocov3"
    assert {why for name, why in report.ignored.items() if "momentum" in name} == {
        "the momentum copy of a pretraining; the base encoder is taken"
    }
    assert any("predictor" in name for name in report.ignored)
    x = pixels()
    want = run_peer(model.double(), x)
    for place, options in ((path, HEADS), (tmp_path / "hub", {})):
        ours = vit_torch.AutoModel.from_pretrained(
            place, dtype=torch.float64, add_pooling_layer=False, **options
        ).eval()
        with torch.no_grad():
            got = ours(torch.tensor(x)).last_hidden_state[:, 0].numpy()
        assert_close(got, want, FLOAT64)


def test_ibot_has_a_mask_token(tmp_path):
    model = small(num_classes=0)
    state = {**model.state_dict(), "masked_embed": torch.ones(1, 48)}
    torch.save({"state_dict": state}, tmp_path / "checkpoint_teacher.pth")
    report = convert(tmp_path / "checkpoint_teacher.pth", tmp_path / "hub", overrides=HEADS)
    assert report.format_from == "dino"
    assert list(report.ignored) == ["state_dict/masked_embed"]
    x = pixels()
    ours = vit_torch.AutoModel.from_pretrained(tmp_path / "hub", add_pooling_layer=False).double()
    with torch.no_grad():
        got = ours.eval()(torch.tensor(x)).last_hidden_state[:, 0].numpy()
    assert_close(got, run_peer(model.double(), x), FLOAT64)


@pytest.mark.parametrize("saved", [torch.float32, torch.float64])
def test_the_batch_norm_of_a_linear_probe_is_folded(saved, tmp_path):
    """facebookresearch/mae, `main_linprobe.py`."""
    model = small()
    norm = torch.nn.BatchNorm1d(48, affine=False, eps=1e-6)
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    norm.running_var.uniform_(0.3, 3.0, generator=torch.Generator().manual_seed(2))
    model.head = torch.nn.Sequential(norm, model.head)
    model = model.to(saved).eval()
    path = tmp_path / "checkpoint-89.pth"
    torch.save({"model": model.state_dict(), "epoch": 89}, path)
    report = convert(path, tmp_path / "hub", overrides=HEADS)
    assert report.format_from == "mae"
    (note,) = [note for note in report.set if note.field == "classifier"]
    assert note.value == "head.0.* folded into head.1.*"
    x = pixels()
    want = run_peer(model.double(), x)
    # The folded layer is rounded to the file's dtype once.
    bound = FLOAT64 if saved == torch.float64 else 1e-6
    assert_close(run_torch(path, x, **HEADS), want, bound)
    assert_close(run_torch(tmp_path / "hub", x), want, bound)
    assert_close(run_flax(load_flax(path, **HEADS), x), want, FLOAT32)


@pytest.mark.parametrize("prefix", ["vit.", "backbone."])
def test_a_batch_norm_under_other_names_is_not_dropped(prefix, tmp_path):
    """Its epsilon is known for MAE's probes alone, so the head is refused, and named."""
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    network = transformers.ViTModel(config, add_pooling_layer=False)
    norm = torch.nn.BatchNorm1d(48, affine=False)
    head = torch.nn.Sequential(norm, torch.nn.Linear(48, 5))
    config.save_pretrained(tmp_path)
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for cls in (vit_torch.AutoModelForImageClassification, FlaxAutoModelForImageClassification):
        with pytest.raises(CheckpointError, match=r"head\.0\.running_mean"):
            cls.from_pretrained(tmp_path)


# -- Google


def linen(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As the code of vision_transformer names its parameters since it is written in linen."""
    spelled = {}
    for name, value in weights.items():
        for before, after in (
            ("LayerNorm_2", "LayerNorm_1"),
            ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
            ("MlpBlock_3", "MlpBlock_0"),
        ):
            name = name.replace(before, after)
        spelled[name] = value
    return spelled


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    return unflatten_dict({tuple(name.split("/")): value for name, value in flat.items()})


@pytest.mark.parametrize("saved", ["npz", "npz under params", "tree", "training"])
def test_vision_transformer_by_its_own_names(saved, tmp_path):
    weights = google_weights()
    named = linen(weights)
    if saved.startswith("npz"):
        path = tmp_path / "model.npz"
        root = "params/" if "params" in saved else ""
        np.savez(path, **{root + name: value for name, value in named.items()})
    else:
        path = tmp_path / "checkpoint_100"
        tree = nested(named)
        if saved == "training":  # `vit_jax/train.py`: (params, state of the optimizer, step)
            trace = nested({name: value + 1 for name, value in named.items()})
            path.write_bytes(serialization.to_bytes((tree, ({"trace": trace}, {}), 100)))
        else:
            path.write_bytes(serialization.to_bytes(tree))
    report = convert(path, tmp_path / "hub")
    assert report.format_from == "google"
    assert "own training" in report.describes
    x = pixels()
    want = google_forward(weights, x.transpose(0, 2, 3, 1), big_vision=False, pool="tok")
    assert_reads(path, tmp_path / "hub", want, x)
    convert(tmp_path / "hub", tmp_path / "again.npz")
    again = np.load(tmp_path / "again.npz")
    assert set(again) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def sincos2d(h: int, w: int, width: int) -> np.ndarray:
    """`posemb_sincos_2d` of big_vision, float64."""
    y, x = np.mgrid[:h, :w]
    omega = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]


@pytest.mark.parametrize("cls", [True, False])
def test_fixed_positions_of_big_vision(cls, tmp_path):
    """arXiv:2205.01580; the published networks have no class token, and a layer before the head."""
    weights = google_weights(big_vision=True, cls=cls, pre_logits=None if cls else 48)
    del weights["pos_embedding"]
    path = tmp_path / "i1k_s16.npz"
    np.savez(path, **{f"params/{name}": value for name, value in weights.items()})
    report = convert(path, tmp_path / "hub", overrides={"image_size": 32})
    assert "sincos2d" in report.describes
    assert any(note.field == "positions" for note in report.set)
    with_positions = {**weights, "pos_embedding": sincos2d(4, 4, 48)}
    x = pixels()
    pool = "tok" if cls else "gap"
    want = google_forward(with_positions, x.transpose(0, 2, 3, 1), big_vision=True, pool=pool)
    # Positions are rounded to the weights' dtype.
    assert_close(run_torch(path, x, image_size=32), want, 1e-6)
    assert_close(run_torch(tmp_path / "hub", x), want, 1e-6)
    assert_close(run_flax(load_flax(path, image_size=32), x), want, FLOAT32)


@pytest.mark.parametrize("size", [48, 16])
def test_fixed_positions_are_computed_for_another_size(size, tmp_path):
    """As big_vision does, whose code makes them for whatever grid an image has."""
    weights = google_weights(big_vision=True, cls=False)
    del weights["pos_embedding"]
    np.savez(tmp_path / "s16.npz", **weights)
    convert(tmp_path / "s16.npz", tmp_path / "hub", overrides={"image_size": 32}, image_size=size)
    weights["pos_embedding"] = sincos2d(size // 8, size // 8, 48)
    x = pixels((size, size))
    want = google_forward(weights, x.transpose(0, 2, 3, 1), big_vision=True, pool="gap")
    assert_close(run_torch(tmp_path / "hub", x), want, 1e-6)


def test_fixed_positions_are_of_the_published_size_where_nothing_says_it(tmp_path):
    weights = google_weights(big_vision=True, cls=False)
    del weights["pos_embedding"]
    np.savez(tmp_path / "s16.npz", **weights)
    report = convert(tmp_path / "s16.npz", tmp_path / "hub")
    assert ("image_size", 224) in [(note.field, note.value) for note in report.set]


def test_fixed_positions_are_those_of_the_authors():
    np.testing.assert_allclose(
        google.sines_and_cosines((3, 5), 24), sincos2d(3, 5, 24)[0], atol=1e-7
    )
    # MAE, `get_2d_sincos_pos_embed`: "here w goes first".
    grid = np.meshgrid(np.arange(5.0), np.arange(3.0))
    omega = 1.0 / 10_000 ** (np.arange(6) / 6.0)
    outer = [np.einsum("m,d->md", axis.reshape(-1), omega) for axis in grid]
    theirs = np.concatenate([f(o) for o in outer for f in (np.sin, np.cos)], axis=1)
    np.testing.assert_allclose(mae.sines_and_cosines((3, 5), 24), theirs, atol=1e-7)
    # MoCo v3, `build_2d_sincos_position_embedding`, whose grids are square.
    grid_w, grid_h = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    omega = 1.0 / (10_000 ** (torch.arange(6, dtype=torch.float32) / 6))
    out_w = torch.einsum("m,d->md", [grid_w.flatten(), omega])
    out_h = torch.einsum("m,d->md", [grid_h.flatten(), omega])
    parts = [torch.sin(out_w), torch.cos(out_w), torch.sin(out_h), torch.cos(out_h)]
    theirs = torch.cat(parts, dim=1).numpy()
    np.testing.assert_allclose(moco.sines_and_cosines((4, 4), 24), theirs, atol=1e-6)


def test_hybrids_that_lack_most_of_their_stem_are_refused(tmp_path):
    weights = google_weights()
    weights["conv_root/kernel"] = np.ones((7, 7, 3, 64), np.float32)
    weights["gn_root/scale"] = np.ones((1, 1, 1, 64), np.float32)
    weights["block2/unit1/conv1/kernel"] = np.ones((1, 1, 64, 64), np.float32)
    weights["embedding/kernel"] = np.ones((1, 1, 1024, 48), np.float32)
    np.savez(tmp_path / "R50_ViT-B_16.npz", **weights)
    with pytest.raises(CheckpointError, match="blocks of the stem are missing"):
        convert(tmp_path / "R50_ViT-B_16.npz", tmp_path / "hub")
    for auto in (vit_torch.AutoModel, vit_torch.AutoModelForImageClassification):
        with pytest.raises(CheckpointError, match="blocks of the stem are missing"):
            auto.from_pretrained(tmp_path / "R50_ViT-B_16.npz")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("stem", ["patch_embed.proj.0", "patch_embed.backbone.conv1.0"])
def test_convolutional_stems_are_refused_by_name(stem, tmp_path):
    state = small().state_dict()
    state[f"{stem}.weight"] = torch.ones(24, 3, 3, 3)
    if "backbone" not in stem:
        del state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    torch.save({"state_dict": state}, tmp_path / "hybrid.pth")
    with pytest.raises(CheckpointError, match="convolutional stem before its patches"):
        convert(tmp_path / "hybrid.pth", tmp_path / "hub", overrides=HEADS)


# -- Transformers


@pytest.mark.parametrize("names", ["v4", "v5"])
def test_vit_mae_by_the_names_of_transformers(names, tmp_path):
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        image_size=32, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=40, mask_ratio=0.0,
    )  # fmt: skip
    model = randomise(transformers.ViTMAEForPreTraining(config))
    model.save_pretrained(tmp_path / "mae")
    if names == "v5":
        from safetensors.torch import load_file, save_file

        from vit_convert.formats.huggingface import BLOCK

        spelled = {}
        for name, value in load_file(tmp_path / "mae" / "model.safetensors").items():
            for ours, theirs in BLOCK.items():
                name = name.replace(f"vit.encoder.layer.0.{ours}.", f"vit.layers.0.{theirs}.")
                name = name.replace(f"vit.encoder.layer.1.{ours}.", f"vit.layers.1.{theirs}.")
            spelled[name] = value
        save_file(spelled, tmp_path / "mae" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "mae", tmp_path / "hub", to="hub")
    x = pixels()
    model.double()
    with torch.no_grad():
        order = torch.arange(16.0).repeat(2, 1)
        want = model.vit(torch.tensor(x), noise=order).last_hidden_state.numpy()
        for place in (tmp_path / "mae", tmp_path / "hub"):
            ours = vit_torch.AutoModel.from_pretrained(
                place, dtype=torch.float64, add_pooling_layer=False
            ).eval()
            assert_close(ours(torch.tensor(x)).last_hidden_state.numpy(), want, 1e-6)


@pytest.mark.parametrize("prefix", ["", pytest.param("timm_model.", marks=pytest.mark.slow)])
def test_timm_wrapper_folders_are_timms(prefix, tmp_path, monkeypatch):
    """As Transformers saves what it loads through timm, which lies where it does not see it."""
    monkeypatch.setattr(transformers.utils.import_utils, "_timm_available", True)
    wrapper = "transformers.models.timm_wrapper"
    modules = [f"{wrapper}.{kind}_timm_wrapper" for kind in ("configuration", "modeling")]
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    configuration, modeling = map(importlib.import_module, modules)
    config = configuration.TimmWrapperConfig.from_dict(
        {
            "architecture": "test_vit",
            "num_classes": 7,
            "label_names": list("abcdefg"),
            "model_args": {"img_size": 32},
            "pretrained_cfg": {
                "input_size": [3, 32, 32],
                "mean": [0.4, 0.5, 0.6],
                "std": [0.1, 0.2, 0.3],
                "interpolation": "bicubic",
                "crop_pct": 0.95,
                "crop_mode": "center",
            },
        }
    )
    model = randomise(modeling.TimmWrapperForImageClassification(config))
    place = tmp_path / "wrapped"
    model.save_pretrained(place)
    if prefix:
        from safetensors.torch import load_file, save_file

        state = load_file(place / "model.safetensors")
        named = {prefix + name: value for name, value in state.items()}
        save_file(named, place / "model.safetensors", {"format": "pt"})
    report = convert(place, tmp_path / "hub")
    assert (report.format_from, report.preprocessing) == ("timm", "timm's pretrained_cfg")
    x = pixels()
    with torch.no_grad():
        want = model.double()(torch.tensor(x)).logits.numpy()
    assert_reads(place, tmp_path / "hub", want, x)
    ours = vit_torch.AutoModelForImageClassification.from_pretrained(place)
    assert list(ours.config.id2label.values()) == list("abcdefg")
    convert(place, tmp_path / "timm", to="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).double().eval()
    assert_close(run_peer(again, x), want, FLOAT64)


# -- Orbax


@pytest.mark.parametrize("saved", ["params", "state", "steps"])
def test_orbax_folders(saved, tmp_path):
    """As the library itself writes them: parameters alone, a training state, a manager's step."""
    ocp = pytest.importorskip("orbax.checkpoint")
    weights = google_weights()
    tree = nested(linen(weights))
    folder = tmp_path / "orbax"
    if saved == "params":
        ocp.PyTreeCheckpointer().save(folder, tree)
    elif saved == "state":
        moments = nested({name: value + 1 for name, value in linen(weights).items()})
        ocp.PyTreeCheckpointer().save(
            folder, {"params": tree, "opt_state": {"mu": moments}, "step": 7}
        )
    else:
        with ocp.CheckpointManager(folder) as manager:
            manager.save(3, args=ocp.args.StandardSave({"params": tree}))
    report = convert(folder, tmp_path / "hub")
    assert report.format_from == "google"
    x = pixels()
    want = google_forward(weights, x.transpose(0, 2, 3, 1), big_vision=False, pool="tok")
    assert_reads(folder, tmp_path / "hub", want, x)


def test_orbax_folders_are_named_where_orbax_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    message = r"written by Orbax(.|\n)*\.restore\(folder\).*to_bytes"
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a", tmp_path / "out")


def test_several_orbax_folders_are_named(tmp_path):
    for step in ("1", "2"):
        (tmp_path / "a" / step).mkdir(parents=True)
        (tmp_path / "a" / step / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"several Orbax checkpoints \(1, 2\)"):
        convert(tmp_path / "a", tmp_path / "out")
