"""Every format of the converter against the models its files are from, every parameter drawn at
random: timm 1.0.31, Transformers 4.57.6, and Google's forward pass written out here.

Names in the files are those of the peers' own state dicts, or spelled here one by one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from format_files import SMALL, VIT, save_timm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import InMemory, make_config, random_weights, torch_twin
from peers import (
    FLOAT64,
    assert_close,
    assert_same_model,
    pixels,
    randomise,
    run_peer,
    run_torch,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.config import (
    ACTIVATIONS,
    BeitConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ViTConfig,
)
from vit_common.errors import ConfigError, InputError
from vit_common.parameters import parameter_shapes
from vit_convert.convert import convert
from vit_convert.forward import forward
from vit_convert.save import save_parameters

DEIT_TINY = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny"


# -- there and back


BEIT_FIELDS = {
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": True,
    "use_mask_token": True,
    "vocab_size": 9,
}
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 5,
}
EVERYWHERE = ("hub", "flax", "flax-safetensors")
# family -> (configuration, what else it can have, head -> formats besides `EVERYWHERE`)
FAMILIES: dict[str, tuple[type, list[dict[str, Any]], dict[str | None, tuple[str, ...]]]] = {
    "vit": (
        ViTConfig,
        [
            {},
            {"qkv_bias": False},
            {"layer_scale_init_value": 1e-5},
            {"num_register_tokens": 2, "position_tokens": "cls"},
            {"use_cls_token": False, "pooling": "mean", "norm_after_pooling": True},
        ],
        {
            None: ("timm", "deit", "dino", "google"),
            "classifier": ("timm", "deit", "dino", "google"),
            "decoder": (),
        },
    ),
    "deit": (
        DeiTConfig,
        [{}, {"qkv_bias": False}],
        {
            None: ("timm", "deit"),
            "classifier": (),
            "teacher": ("timm", "deit"),
            "decoder": (),
        },
    ),
    "beit": (
        BeitConfig,
        [{}, {"layer_scale_init_value": 0.0}, BEIT_FIELDS, {"use_mean_pooling": False}],
        {None: ("timm", "beit"), "classifier": ("timm", "beit"), "tokens": ("beit",)},
    ),
    "dinov2": (
        Dinov2Config,
        [{}, {"use_swiglu_ffn": True}, {"use_mask_token": False}, {"qkv_bias": False}],
        {None: ("dinov2",), "classifier": ()},
    ),
    "registers": (
        Dinov2WithRegistersConfig,
        [{}, {"use_swiglu_ffn": True, "num_register_tokens": 2}],
        {None: ("dinov2",), "classifier": ()},
    ),
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def save_hub(place: Path, family: str, fields, head, dtype: str, depth: int = 2, seed: int = 0):
    """Random weights in the Hub's layout; the arrays as they are in its file."""
    cls, _, _ = FAMILIES[family]
    sizes = {n: v for n, v in SIZES.items() if n in {*cls.fields, "num_labels"}}
    config = cls(**{**sizes, "num_hidden_layers": depth, **fields})
    # A base network without the pooler: other formats have no place for one.
    weights = random_weights(config, head, seed, **({} if head else {"add_pooling_layer": False}))
    tensors = {n: InMemory(w.astype(DTYPES[dtype])) for n, w in weights.items()}
    save_parameters(place, config, tensors, architecture=cls.__name__.replace("Config", "Model"))
    return weight_bytes(place)


def weight_bytes(place: Path) -> dict[str, tuple[Any, ...]]:
    arrays = load_file(place / "model.safetensors")
    return {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in arrays.items()}


def holds(name: str, fields: dict[str, Any], head: str | None) -> bool:
    """Whether a format that knows the family can hold this network of it."""
    if name == "google":
        # No layer scale, no registers, no norm after the mean (a base network has none there).
        absent = {"layer_scale_init_value", "num_register_tokens"}
        absent |= {"norm_after_pooling"} if head else set()
        return not absent & set(fields)
    if name == "timm":  # positions of all tokens in front of the patches, or of none
        return not ("num_register_tokens" in fields and fields.get("position_tokens") == "cls")
    if name == "beit" and head == "tokens":  # one norm at the end, not two
        return fields.get("use_mean_pooling", True)
    return True


@st.composite
def cycles(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    _, variants, heads = FAMILIES[family]
    fields = draw(st.sampled_from(variants))
    head = draw(st.sampled_from(list(heads)))
    if head == "tokens":
        fields = {**fields, "use_mask_token": True}
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    formats = [n for n in (*EVERYWHERE, *heads[head]) if holds(n, fields, head)]
    walk = draw(st.lists(st.sampled_from(formats), min_size=1, max_size=4))
    return family, fields, head, dtype, draw(st.integers(0, 3)), walk


@settings(
    max_examples=8,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cycles())
def test_cycles_of_formats_end_where_they_began(case, tmp_path_factory):
    family, fields, head, dtype, depth, walk = case
    root = tmp_path_factory.mktemp("cycle")
    first = save_hub(root / "0", family, fields, head, dtype, depth)
    begun = json.loads((root / "0" / "config.json").read_text())
    for step, name in enumerate([*walk, "hub"]):
        report = convert(root / str(step), root / str(step + 1), to=name)
        assert report.verification is not None
        assert report.verification.tensors == len(first)
        assert report.dtype == dtype
        assert not report.ignored
    assert weight_bytes(root / str(len(walk) + 1)) == first
    ended = json.loads((root / str(len(walk) + 1) / "config.json").read_text())
    begun.pop("architectures"), ended.pop("architectures")
    assert ended == begun


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_by_way_of_every_format(family, tmp_path):
    """Every format that can hold the weights does, and the others say that they cannot."""
    _, variants, heads = FAMILIES[family]
    pairs = [(head, name) for head, names in heads.items() for name in (*EVERYWHERE[1:], *names)]
    for number, (head, name) in enumerate(pairs):
        fields = variants[number % len(variants)]
        if head == "tokens":
            fields = {**fields, "use_mask_token": True}
        place = tmp_path / str(number)
        first = save_hub(place / "a", family, fields, head, "float32", 1)
        if not holds(name, fields, head):
            with pytest.raises(InputError, match="cannot hold"):
                convert(place / "a", place / "b", to=name)
            assert not (place / "b").exists()
            continue
        convert(place / "a", place / "b", to=name)
        convert(place / "b", place / "c", to="hub", verify=False)
        assert weight_bytes(place / "c") == first, (head, fields, name)


@pytest.mark.parametrize(
    ("family", "head", "fields", "name"),
    [
        ("vit", "classifier", {"layer_scale_init_value": 1e-5}, "google"),
        ("vit", "classifier", {"num_register_tokens": 2}, "google"),
        ("vit", "decoder", {}, "timm"),
        ("beit", "tokens", {"use_mask_token": True, "use_mean_pooling": False}, "beit"),
        ("beit", "tokens", {"use_mask_token": True}, "timm"),
        ("dinov2", "classifier", {}, "dinov2"),
    ],
)
def test_weights_that_a_format_has_no_place_for_are_named(family, head, fields, name, tmp_path):
    save_hub(tmp_path / "a", family, fields, head, "float32", 1)
    with pytest.raises(InputError, match=r"cannot hold \d+ of these tensors: .+\."):
        convert(tmp_path / "a", tmp_path / "b", to=name)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("family", "name"),
    [("beit", "google"), ("dinov2", "timm"), ("deit", "dino"), ("vit", "dinov2"), ("vit", "mae")],
)
def test_formats_that_cannot_hold_a_family_say_so(family, name, tmp_path):
    save_hub(tmp_path / "a", family, {}, None, "float32", 1)
    with pytest.raises(InputError, match=r"holds the families|read here, but not written"):
        convert(tmp_path / "a", tmp_path / "b", to=name)


# -- the forward pass in numpy


NUMPY = {
    "vit": (ViTConfig, "ViTForImageClassification", "classifier", {}),
    "vit, base": (ViTConfig, "ViTModel", None, {}),
    "vit, all of it": (
        ViTConfig,
        "ViTForImageClassification",
        "classifier",
        {
            "layer_scale_init_value": 1e-5,
            "num_register_tokens": 2,
            "position_tokens": "cls",
            "use_representation_layer": True,
            "pooler_output_size": 30,
            "qkv_bias": False,
        },
    ),
    "vit, gated mean": (
        ViTConfig,
        "ViTForImageClassification",
        "classifier",
        {"use_swiglu_ffn": True, "pooling": "mean", "use_cls_token": False},
    ),
    "vit, norm of the mean": (
        ViTConfig,
        "ViTForImageClassification",
        "classifier",
        {"pooling": "mean", "norm_after_pooling": True, "position_tokens": "patches"},
    ),
    "deit": (DeiTConfig, "DeiTForImageClassification", "classifier", {}),
    "deit, teacher": (DeiTConfig, "DeiTForImageClassificationWithTeacher", "teacher", {}),
    "beit": (BeitConfig, "BeitForImageClassification", "classifier", BEIT_FIELDS),
    "beit, class token": (BeitConfig, "BeitModel", None, {"use_mean_pooling": False}),
    "beit, tokens": (
        BeitConfig,
        "BeitForMaskedImageModeling",
        "tokens",
        {"vocab_size": 9, "use_mask_token": True, "use_mean_pooling": False},
    ),
    "dinov2": (Dinov2Config, "Dinov2ForImageClassification", "classifier", {}),
    "dinov2, gated": (Dinov2Config, "Dinov2Model", None, {"use_swiglu_ffn": True}),
    "registers": (
        Dinov2WithRegistersConfig,
        "Dinov2WithRegistersForImageClassification",
        "classifier",
        {},
    ),
}


def assert_numpy_agrees(cls, model_name: str, head, fields) -> None:
    sizes = {n: v for n, v in SIZES.items() if n in {*cls.fields, "num_labels"}}
    config = cls(**{**sizes, "num_hidden_layers": 2, "image_size": (16, 24), **fields})
    weights = random_weights(config, head)
    model = torch_twin(getattr(vit_torch, model_name), config, weights, torch.float64)
    x = np.random.default_rng(1).normal(size=(1, 3, 16, 24))
    with torch.no_grad():
        out = model(torch.tensor(x))
    want = (out.logits if "logits" in out else out.pooler_output).numpy()[0].reshape(-1)
    prefix = f"{config.base_model_prefix}."
    tensors = {n.removeprefix(prefix): InMemory(w) for n, w in weights.items()}
    got = forward(config, tensors, x[0])
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    assert len(set(parameter_shapes(config, head)) - set(weights)) == 0


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_computes_what_the_twins_do(name):
    assert_numpy_agrees(*NUMPY[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numpy_has_every_activation(activation):
    acts = {"hidden_act": activation, "pooler_act": activation}
    assert_numpy_agrees(ViTConfig, "ViTModel", None, acts)


def test_an_activation_that_numpy_does_not_have():
    config = make_config(hidden_act=lambda x: x)
    tensors = {n: InMemory(w) for n, w in random_weights(config, None).items()}
    with pytest.raises(ConfigError, match="cannot be run in numpy"):
        forward(config, tensors, np.zeros((3, 32, 32)))


# -- a real network


@pytest.mark.slow
@pytest.mark.skipif(not DEIT_TINY.is_dir(), reason="the shared DeiT-Tiny is not beside this clone")
def test_the_real_deit_tiny_in_every_layout_names_the_photos(tmp_path):
    from skimage import data

    from vit_flax.inference import ImageClassifier

    source = DEIT_TINY / "model.safetensors"
    for to in ("hub", "flax", "google"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = convert(DEIT_TINY, tmp_path / to, to=to)
        assert report.source == str(source)
        assert report.verification.logits_max_abs <= 1e-5 * report.verification.logits_scale
    classifier = ImageClassifier.from_pretrained(tmp_path / "flax")
    cat, coffee = classifier([data.chelsea(), data.coffee()], top_k=1)
    assert cat[0].label.split(",")[0] in ("Egyptian cat", "tabby", "tiger cat")
    assert coffee[0].label.split(",")[0] in ("espresso", "cup")
    for to in ("hub", "google"):
        other = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(tmp_path / to)
        assert_same_model(other, classifier.model)
    with np.load(tmp_path / "google" / "model.npz") as file:
        assert file["Transformer/encoderblock_11/MlpBlock_3/Dense_0/kernel"].shape == (192, 768)


def test_safetensors_of_the_projects_are_found_by_their_config(tmp_path):
    """A directory as the Hub has them: config.json says the family, whatever the file is called."""
    model = randomise(timm.create_model(VIT, **SMALL))
    (tmp_path / "timm").mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / "model.safetensors")
    save_timm(model, tmp_path / "timm")
    report = convert(tmp_path / "timm" / "model.safetensors", tmp_path / "one.safetensors")
    assert report.format_from == "timm"
    x = pixels()
    got = run_torch(tmp_path / "one.safetensors", x)
    assert_close(got, run_peer(model.double(), x), FLOAT64)
