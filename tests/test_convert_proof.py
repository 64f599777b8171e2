"""The proof of a conversion: it computes in float64, so that no processor's rounding decides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import InMemory, make_config, random_weights, torch_twin
from safetensors.numpy import load_file, save_file

import vit_torch
from vit_common.errors import CheckpointError
from vit_convert import proof, write
from vit_convert.convert import convert
from vit_convert.forward import forward
from vit_convert.save import save_parameters

DIGITS = Path(__file__).parents[1] / "vit_common" / "digits"


def saved(place: Path, **fields) -> Path:
    config = make_config(**fields)
    weights = random_weights(config, "classifier")
    tensors = {n: InMemory(w.astype(np.float32)) for n, w in weights.items()}
    save_parameters(place, config, tensors, architecture="ViTForImageClassification")
    return place


def test_the_trained_digits_network_through_timm_and_flax(tmp_path):
    """In float32, a processor with AVX-512 differed by 2.4e-6 between these layouts."""
    convert(DIGITS, tmp_path / "timm", to="timm")
    report = convert(tmp_path / "timm", tmp_path / "flax", to="flax")
    assert report.verification.logits_max_abs <= 1e-13 * report.verification.logits_scale


def test_numpy_is_as_exact_as_torch_in_float64():
    config = make_config(hidden_act="gelu_new")
    weights = random_weights(config, "classifier")
    model = torch_twin(vit_torch.ViTForImageClassification, config, weights, torch.float64)
    x = np.random.default_rng(1).normal(size=(1, 3, 32, 32))
    with torch.no_grad():
        want = model(torch.tensor(x)).logits.numpy()[0]
    tensors = {n.removeprefix("vit."): InMemory(w) for n, w in weights.items()}
    got = forward(config, tensors, x[0])
    assert np.abs(got - want).max() <= 1e-13 * np.abs(want).max()


def test_the_order_of_arrays_in_memory_changes_no_bit():
    config = make_config()
    weights = {
        n.removeprefix("vit."): w.astype(np.float32)
        for n, w in random_weights(config, "classifier").items()
    }
    x = np.random.default_rng(1).normal(size=(3, 32, 32))
    first = forward(config, {n: InMemory(w) for n, w in weights.items()}, x)
    turned = {n: InMemory(np.asfortranarray(w)) for n, w in weights.items()}
    np.testing.assert_array_equal(first, forward(config, turned, x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_is_reported_and_the_configuration_still_judged(
    dtype, tmp_path, monkeypatch
):
    """A wrong epsilon is far smaller than the rounding of the weights."""
    source = saved(tmp_path / "in")
    report = convert(source, tmp_path / "out", dtype=dtype)
    assert report.verification.logits_max_abs > 1e-4
    original = write._write_into

    def spoiled(staging, *args):
        original(staging, *args)
        config = json.loads((staging / "config.json").read_text())
        (staging / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))

    monkeypatch.setattr(write, "_write_into", spoiled)
    with pytest.raises(CheckpointError, match=r"layer_norm_eps \(1e-06 instead of 1e-12\)"):
        convert(source, tmp_path / "out", dtype=dtype, force=True)


def test_a_failure_says_only_what_is_known(tmp_path, monkeypatch):
    source = saved(tmp_path / "in")
    calls = iter([1.0, 1.1])
    monkeypatch.setattr(proof, "forward", lambda *_: np.full(5, next(calls)))
    with pytest.raises(CheckpointError, match="read back is the same in every field"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_weight_is_named(tmp_path, monkeypatch):
    source = saved(tmp_path / "in")
    original = write._write_into

    def spoiled(staging, *args):
        original(staging, *args)
        arrays = load_file(staging / "model.safetensors")
        arrays["classifier.bias"] = arrays["classifier.bias"] + np.float32(1e-3)
        save_file(arrays, staging / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(write, "_write_into", spoiled)
    with pytest.raises(CheckpointError, match=r"classifier\.bias differs"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "formats", "said"),
    [
        ({"hidden_act": "relu"}, ("deit", "dino", "torchvision", "google"), "hidden_act='gelu"),
        ({"pooling": "mean"}, ("deit", "dino", "torchvision", "google"), "pooling='cls'"),
        ({}, ("deit", "dino", "torchvision", "google"), None),
        ({"pooling": "mean", "use_cls_token": False}, ("dino", "google"), None),
        ({"hidden_act": "relu", "pooling": "mean"}, ("hub", "flax", "timm"), None),
    ],
)
def test_what_weights_alone_do_not_say_is_said_when_they_are_written(
    tmp_path, fields, formats, said
):
    """Read without a configuration beside them, they would be another network without a word."""
    config = make_config(**fields, layer_norm_eps=1e-6)
    vit_torch.ViTForImageClassification(config).save_pretrained(tmp_path / "source")
    for to in formats:
        report = convert(tmp_path / "source", tmp_path / to, to=to, verify=False)
        found = [text for text in report.warnings if "gives other outputs" in text]
        assert len(found) == (said is not None), to
        assert said is None or said in found[0]
