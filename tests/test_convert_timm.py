"""The converter against timm 1.0.31: its models, positions, names and preprocessing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm_table
import torch
from format_files import SMALL, TIMM, VIT, make_timm, save_pickle, save_timm
from networks import randomize
from peers import (
    FLOAT32,
    FLOAT64,
    LARGER,
    NATIVE,
    RESIZED,
    WIDE,
    assert_close,
    assert_same_model,
    load_flax,
    pixels,
    run_flax,
    run_peer,
    run_torch,
)
from safetensors.numpy import load_file
from timm_models import as_microsoft, timm

import vit_flax
import vit_torch
from vit_common.errors import CheckpointError, ConfigError
from vit_convert.convert import convert
from vit_convert.formats.timm import arguments
from vit_convert.formats.timm import models as timm_models

# -- timm


# Those of which the twins differ in how they are built; compiling takes longer than all the rest.
FLAX = (
    "plain",
    "registers, no_embed_class",
    "gated",
    "distilled",
    "beit, all",
)


@pytest.mark.parametrize("name", TIMM)
def test_timm_directly_and_converted(name, tmp_path):
    dynamic = {} if name.startswith("beit") else {"dynamic_img_size": True}
    model = make_timm(name, **dynamic)
    source = save_timm(model, tmp_path / "timm")
    native = (32, 48) if name == "wide image" else NATIVE
    x = pixels(native)
    want32 = run_peer(model, x)
    model.double()
    want = run_peer(model, x)
    assert_close(run_torch(source, x), want, FLOAT64)
    direct = load_flax(source) if name in FLAX else None
    if direct is not None:
        assert_close(run_flax(direct, x), want32, FLOAT32)
    if dynamic:
        for size in (LARGER, WIDE):
            larger = pixels(size, 1)
            assert_close(run_torch(source, larger), run_peer(model, larger), RESIZED)

    for to in ("hub", "flax"):
        report = convert(source, tmp_path / to, to=to)
        assert report.format_from == "timm"
        assert report.verification is not None
        assert not report.ignored
        assert_close(run_torch(tmp_path / to, x), want, FLOAT64)
        if direct is not None:
            assert_same_model(load_flax(tmp_path / to), direct)
    back = convert(tmp_path / "flax", tmp_path / "back", to="timm")
    assert back.verification is not None
    again, first = (load_file(place / "model.safetensors") for place in (tmp_path / "back", source))
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in first.items()}
    for key, value in first.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


@pytest.mark.parametrize(
    "name", ["plain", "registers, no_embed_class", "mean, no fc_norm", "beit, shared", "distilled"]
)
def test_timm_reads_what_is_written_for_it(name, tmp_path):
    """The config.json written here makes timm build the same network."""
    model = make_timm(name).double()
    save_timm(model.float(), tmp_path / "timm")
    convert(tmp_path / "timm", tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "again", to="timm")
    table = json.loads((tmp_path / "again" / "config.json").read_text())
    other = timm.create_model(
        table["architecture"], num_classes=table["num_classes"], **table["model_args"]
    )
    other.load_state_dict(
        {n: torch.tensor(v) for n, v in load_file(tmp_path / "again/model.safetensors").items()}
    )
    x = pixels()
    assert_close(run_peer(other.eval().double(), x), run_peer(model.double(), x), FLOAT64)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("plain", 64),
        ("plain", (24, 56)),
        ("plain", 16),
        *((name, (24, 56)) for name in ("registers", "no_embed_class", "distilled", "layer scale")),
        # The same rule for the patches, whatever is in front of them.
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name in ("registers", "no_embed_class", "distilled", "layer scale")
            for size in (64, 16)
        ),
    ],
)
def test_image_size_resamples_timm_positions_as_timm_does(name, size, tmp_path):
    model = make_timm(name)
    save_timm(model, tmp_path / "timm")
    convert(tmp_path / "timm", tmp_path / "out", image_size=size)
    height, width = size if isinstance(size, tuple) else (size, size)
    prefix = 0 if "no_embed_class" in name else model.num_prefix_tokens
    want = timm.layers.resample_abs_pos_embed(
        model.pos_embed.double(), [height // 8, width // 8], num_prefix_tokens=prefix
    )
    key = "embeddings.position_embeddings"
    [got] = [v for n, v in load_file(tmp_path / "out" / "model.safetensors").items() if key in n]
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=1e-6)
    assert vit_torch.AutoConfig.from_pretrained(tmp_path / "out").image_height_width == (
        height,
        width,
    )


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:.*searchsorted")  # timm's
@pytest.mark.parametrize("name", ["beit", "beit, shared"])
@pytest.mark.parametrize("size", [64, (24, 56), 24])
def test_image_size_resamples_relative_positions_as_timm_does(name, size, tmp_path):
    model = make_timm(name)
    save_timm(model, tmp_path / "timm")
    report = convert(tmp_path / "timm", tmp_path / "out", image_size=size)
    assert "geometric" in next(n.origin for n in report.set if n.field == "image_size")
    larger = make_timm(name, img_size=size)
    larger.load_state_dict(timm.models.beit.checkpoint_filter_fn(dict(model.state_dict()), larger))
    x = pixels(size if isinstance(size, tuple) else (size, size))
    assert_close(run_torch(tmp_path / "out", x), run_peer(larger.double(), x), RESIZED)


def test_image_size_of_microsofts_beit_is_by_its_own_rule(tmp_path, monkeypatch):
    model = make_timm("beit")
    path = save_pickle({"model": dict(model.state_dict())}, tmp_path / "beit.pth")
    report = convert(path, tmp_path / "out", image_size=64)
    assert report.format_from == "beit"
    origin = next(n.origin for n in report.set if n.field == "image_size")
    assert origin == "given; relative positions by geometric_cubic"
    as_microsoft(monkeypatch)
    larger = make_timm("beit", img_size=64)
    larger.load_state_dict(timm.models.beit.checkpoint_filter_fn(dict(model.state_dict()), larger))
    x = pixels((64, 64))
    assert_close(run_torch(tmp_path / "out", x), run_peer(larger.double(), x), RESIZED)


def test_timm_pickles_without_a_config(tmp_path):
    """Nothing beside the file: heads are asked for, and the rest is in the shapes."""
    model = make_timm("registers", no_embed_class=True)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"heads.*width of 48.*--heads"):
        convert(tmp_path / "bare.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = convert(tmp_path / "bare.pth", tmp_path / "out", overrides={"num_attention_heads": 4})
    assert {note.field: note.origin for note in report.set}["num_attention_heads"] == "given"
    x = pixels()
    assert_close(run_torch(tmp_path / "out", x), run_peer(model.double(), x), FLOAT64)
    logits = run_torch(tmp_path / "bare.pth", x, num_attention_heads=4)
    assert_close(logits, run_peer(model, x), FLOAT64)


REFUSED = {
    "rotary positions of three axes": (
        "vit_base_patch16_rope_224",
        {"rope_type": "mrope", "rope_mrope_section": (2, 2, 2), "rope_grid_indexing": "ij"},
        ("rope_type='mrope'",),
    ),
    "windows": ("samvit_base_patch16", {"global_attn_indexes": (1,)}, ("windows",)),
}

ELSEWHERE = {
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "norms of query and key": (VIT, {"qk_norm": True}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "norms after the branches": ("vit_base_patch16_rpn_224", {}),
    "no norm at the end": ("vit_base_patch16_radio_v3", {}),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_norms_and_pooling_elsewhere(name, tmp_path):
    architecture, differing = ELSEWHERE[name]
    model = randomize(timm.create_model(architecture, **{**SMALL, **differing}))
    save_timm(model, tmp_path / "timm")
    x = pixels()
    wanted = run_peer(model.double(), x)
    assert_close(run_torch(tmp_path / "timm", x), wanted, FLOAT64)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("options", [{}, {"overrides": {"num_attention_heads": 4}}])
def test_other_networks_of_timm_are_refused_by_name(name, options, tmp_path):
    architecture, differing, named = REFUSED[name]
    model = timm.create_model(architecture, **{**SMALL, **differing})
    save_timm(model, tmp_path / "timm")
    with pytest.raises((CheckpointError, ConfigError)) as error:
        convert(tmp_path / "timm", tmp_path / "out", **options)
    for each in named:
        assert each in str(error.value)
    assert not (tmp_path / "out").exists()


def test_keywords_of_timm_that_change_the_network_are_refused(tmp_path):
    model = make_timm("plain")
    save_timm(model, tmp_path / "timm")
    path = tmp_path / "timm" / "config.json"
    table = json.loads(path.read_text())
    for key, value in (("pre_norm", True), ("norm_layer", "rmsnorm"), ("act_layer", "hard_swish")):
        odd = {**table, "model_args": {**table["model_args"], key: value}}
        path.write_text(json.dumps(odd))
        with pytest.raises(ConfigError, match=rf"{key}=.*changes the network"):
            convert(tmp_path / "timm", tmp_path / "out")
        with pytest.raises(ConfigError, match=rf"{key}=.*changes the network"):
            vit_flax.FlaxAutoModel.from_pretrained(tmp_path / "timm")


@pytest.mark.slow
def test_the_table_of_names_is_what_timm_says():
    """`python tests/timm_table.py` writes it anew."""
    assert timm_table.PATH.read_text() == timm_table.source()


SAMPLE = [
    "vit_tiny_patch16_224",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_medium_patch16_gap_240",
    "vit_base_patch32_siglip_gap_256",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so400m_patch16_siglip_gap_256",
    "vit_giant_patch14_reg4_dinov2",
    "vit_wee_patch16_reg1_gap_256",
    "vit_base_patch16_clip_quickgelu_224",
    "deit3_huge_patch14_224",
    "beitv2_large_patch16_224",
    "deit_base_distilled_patch16_384",
    "flexivit_small",
    "eva_giant_patch14_clip_224",
    "vit_pe_core_small_patch16_384",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_what_timms_names_say_is_what_its_models_are(name):
    # Without blocks to spare: every block of a network is alike.
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    block = model.blocks[0]
    assert timm_models.HEADS[name] == block.attn.num_heads
    said, _ = arguments.fields_of(name, {})
    assert said["layer_norm_eps"] == block.norm1.eps
    act = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    act["SiLU"] = "gelu"  # it gates: SwiGLU
    assert said["hidden_act"] == act[type(block.mlp.act).__name__]


def test_preprocessing_is_that_of_timm(tmp_path):
    model = make_timm("plain")
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "crop_pct": 0.8,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
    }
    save_timm(model, tmp_path / "timm")
    report = convert(tmp_path / "timm", tmp_path / "hub")
    assert report.preprocessing == "timm's pretrained_cfg"
    table = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert table["image_mean"] == [0.1, 0.2, 0.3]
    assert table["image_std"] == [0.4, 0.5, 0.6]
    assert table["resample"] == 2
    assert table["size"] == {"shortest_edge": 40}
    assert table["crop_size"] == {"height": 32, "width": 32}
