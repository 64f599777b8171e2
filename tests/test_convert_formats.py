"""Every format of the converter against the models its files are from, every parameter drawn at
random: timm 1.0.31, Transformers 4.57.6, and Google's forward pass written out here.

Names in the files are those of the peers' own state dicts, or spelled here one by one.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import InMemory, make_config, random_weights, torch_twin
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
    randomise,
    run_flax,
    run_peer,
    run_torch,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file
from timm_models import as_microsoft, timm

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
from vit_common.errors import CheckpointError, ConfigError, InputError
from vit_common.parameters import parameter_shapes
from vit_convert.convert import convert
from vit_convert.formats import timm_models
from vit_convert.forward import forward
from vit_convert.save import save_parameters

DEIT_TINY = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny"

# -- timm

SMALL = {
    "depth": 2,
    "embed_dim": 48,
    "num_heads": 4,  # not what the architecture's name says
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
}
VIT, BEIT, DISTILLED = (
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
)
AVERAGE = {"global_pool": "avg"}
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
TIMM = {
    "plain": (VIT, {}),
    "registers": (VIT, {"reg_tokens": 3}),
    "registers, no_embed_class": (VIT, {"reg_tokens": 3, "no_embed_class": True}),
    "no_embed_class": (VIT, {"no_embed_class": True}),
    "no class token": (VIT, {"class_token": False, **AVERAGE}),
    "no class token, fc_norm off": (VIT, {"class_token": False, "fc_norm": False, **AVERAGE}),
    "registers only": (
        VIT,
        {"class_token": False, "reg_tokens": 2, "no_embed_class": True} | AVERAGE,
    ),
    "fc_norm": (VIT, AVERAGE),
    "mean, no fc_norm": (VIT, {"fc_norm": False, **AVERAGE}),
    "layer scale": (VIT, {"init_values": 1e-5}),
    "tanh": (VIT, {"act_layer": "gelu_tanh"}),
    "quick": (VIT, {"act_layer": "quick_gelu"}),
    "relu": (VIT, {"act_layer": "relu"}),
    "tanh by name": ("vit_so400m_patch16_siglip_gap_256", {}),
    "gated": ("vit_giant_patch14_dinov2", {"mlp_ratio": 3.0}),
    "no qkv bias": (VIT, {"qkv_bias": False}),
    "narrow mlp": (VIT, {"mlp_ratio": 1.5}),
    "wide image": (VIT, {"img_size": (32, 48)}),
    "deit3": ("deit3_small_patch16_224", {}),
    "distilled": (DISTILLED, {}),
    "beit": (BEIT, {}),
    "beit, no layer scale": (BEIT, {"init_values": None}),
    "beit, shared": (BEIT, SHARED),
    "beit, positions": (BEIT, {"use_abs_pos_emb": True, "use_rel_pos_bias": False}),
    "beit, all": (BEIT, {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}),
    "beit, class token": (BEIT, {"global_pool": "token"}),
}


# Those of which the twins differ in how they are built; compiling takes longer than all the rest.
FLAX = (
    "plain",
    "registers, no_embed_class",
    "gated",
    "distilled",
    "beit, all",
)


def make_timm(name: str, **more: Any) -> Any:
    architecture, differing = TIMM[name]
    return randomise(timm.create_model(architecture, **{**SMALL, **differing, **more}))


def save_timm(model: Any, place: Path) -> Path:
    """As timm's `push_to_hub` writes it."""
    place.mkdir(parents=True, exist_ok=True)
    timm.models.save_for_hf(model, place, safe_serialization=True)
    return place


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
    "norm before the blocks": (
        "vit_base_patch16_clip_224",
        {},
        ("norm_pre.weight", "norm_pre.bias"),
    ),
    "norms of query and key": (
        VIT,
        {"qk_norm": True},
        [f"blocks.{i}.attn.{n}_norm.{w}" for i in (0, 1) for n in "qk" for w in ("weight", "bias")],
    ),
    "attention pooling": (
        "vit_base_patch16_siglip_224",
        {},
        ("attn_pool.latent", "attn_pool.q.weight", "attn_pool.mlp.fc2.bias"),
    ),
    "norms after the branches": ("vit_base_patch16_rpn_224", {}, ("vit_base_patch16_rpn_224",)),
    "parallel blocks": ("vit_small_patch16_18x2_224", {"depth": 1}, ("blocks.0.attns.0",)),
}


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


SAMPLE = [
    "vit_tiny_patch16_224",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_medium_patch16_gap_240",
    "vit_base_patch32_siglip_gap_256",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so400m_patch16_siglip_gap_256",
    "vit_giant_patch14_reg4_dinov2",
    "vit_wee_patch16_reg1_gap_256",
    "deit3_huge_patch14_224",
    "beitv2_large_patch16_224",
    "deit_base_distilled_patch16_384",
    "flexivit_small",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_what_timms_names_say_is_what_its_models_are(name):
    # Without blocks to spare: every block of a network is alike.
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    block = model.blocks[0]
    assert timm_models.HEADS[name] == block.attn.num_heads
    assert timm_models.EPS.get(name, 1e-6) == block.norm1.eps
    act = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "gelu"}  # SiLU gates: SwiGLU
    assert timm_models.ACTIVATIONS.get(name, "gelu") == act[type(block.mlp.act).__name__]


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


# -- Google


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def google_forward(p: dict[str, np.ndarray], images: np.ndarray, *, big_vision: bool, pool: str):
    """Dosovitskiy et al. 2021, section 3.1, with the names, layouts and constants of the public
    code; float64. `images` is (B, H, W, C)."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    first, second, attn, mlp = (
        ("LayerNorm_0", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")
        if big_vision
        else ("LayerNorm_0", "LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")
    )

    def norm(x, name):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    kernel = p["embedding/kernel"]  # (P, P, C, D)
    side = kernel.shape[0]
    b, height, width, _ = images.shape
    x = np.zeros((b, height // side, width // side, kernel.shape[3]))
    for row in range(height // side):
        for column in range(width // side):
            patch = images[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            x[:, row, column] = np.einsum("bhwc,hwcd->bd", patch, kernel)
    x = (x + p["embedding/bias"]).reshape(b, -1, kernel.shape[3])

    def with_class_token(x):
        return np.concatenate([np.tile(p["cls"], (b, 1, 1)), x], 1) if "cls" in p else x

    if big_vision:  # positions first, then the class token, where it has none of them
        if p["pos_embedding"].shape[1] == x.shape[1]:
            x = with_class_token(x + p["pos_embedding"])
        else:
            x = with_class_token(x) + p["pos_embedding"]
    else:
        x = with_class_token(x) + p["Transformer/posembed_input/pos_embedding"]
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        y = norm(x, f"{block}/{first}")
        q, k, v = (
            np.einsum("bsd,dah->bsah", y, p[f"{block}/{attn}/{n}/kernel"])
            + p[f"{block}/{attn}/{n}/bias"]
            for n in ("query", "key", "value")
        )
        scores = np.einsum("bqah,bkah->baqk", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = np.einsum("baqk,bkah->bqah", weights, v)
        out = np.einsum("bqah,ahd->bqd", context, p[f"{block}/{attn}/out/kernel"])
        x = x + out + p[f"{block}/{attn}/out/bias"]
        y = gelu_tanh(dense(norm(x, f"{block}/{second}"), f"{block}/{mlp}/Dense_0"))
        x = x + dense(y, f"{block}/{mlp}/Dense_1")
    x = norm(x, "Transformer/encoder_norm")
    x = x.mean(1) if pool == "gap" else x[:, 0]
    if "pre_logits/kernel" in p:
        x = np.tanh(dense(x, "pre_logits"))
    return dense(x, "head") if "head/kernel" in p else x


GOOGLE = {
    "vision_transformer": {},
    "pre_logits": {"pre_logits": 40},
    "zero head": {"zero_head": True},
    "training state": {"root": "opt/target/"},
    "big_vision": {"big_vision": True, "root": "params/"},
    "big_vision, positions of all tokens": {"big_vision": True, "root": "params/", "rows": 17},
    "big_vision, image tower": {"big_vision": True, "root": "params/img/"},
    "big_vision, no root": {"big_vision": True},
    "big_vision, gap": {"big_vision": True, "root": "params/", "cls": False},
    "big_vision, pre_logits": {"big_vision": True, "root": "params/", "pre_logits": 48},
}


def google_weights(
    *,
    big_vision: bool = False,
    root: str = "",
    cls: bool = True,
    rows: int | None = None,
    pre_logits: int | None = None,
    zero_head: bool = False,
    heads: int = 3,
    **_: Any,
) -> dict[str, np.ndarray]:
    """The parameters of a network of two blocks, without the root."""
    D, inner, P, K = 48, 80, 8, 7
    attn = f"MultiHeadDotProductAttention_{0 if big_vision else 1}"
    mlp = f"MlpBlock_{0 if big_vision else 3}"
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (P, P, 3, D),
        "embedding/bias": (D,),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
        "head/kernel": (pre_logits or D, K),
        "head/bias": (K,),
    }
    if cls:
        shapes["cls"] = (1, 1, D)
    if big_vision:
        shapes["pos_embedding"] = (1, rows or 16, D)
    else:
        shapes["Transformer/posembed_input/pos_embedding"] = (1, 17, D)
    if pre_logits:
        shapes |= {"pre_logits/kernel": (D, pre_logits), "pre_logits/bias": (pre_logits,)}
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", f"LayerNorm_{1 if big_vision else 2}"):
            shapes |= {f"{block}/{norm}/scale": (D,), f"{block}/{norm}/bias": (D,)}
        for part in ("query", "key", "value"):
            shapes[f"{block}/{attn}/{part}/kernel"] = (D, heads, D // heads)
            shapes[f"{block}/{attn}/{part}/bias"] = (heads, D // heads)
        shapes |= {
            f"{block}/{attn}/out/kernel": (heads, D // heads, D),
            f"{block}/{attn}/out/bias": (D,),
            f"{block}/{mlp}/Dense_0/kernel": (D, inner),
            f"{block}/{mlp}/Dense_0/bias": (inner,),
            f"{block}/{mlp}/Dense_1/kernel": (inner, D),
            f"{block}/{mlp}/Dense_1/bias": (D,),
        }
    rng = np.random.default_rng(5)
    out = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape)
        if name.endswith("kernel"):
            fan_in = np.prod(shape[:2]) if "/out/" in name else shape[0]
            fan_in = P * P * 3 if name.startswith("embedding") else fan_in
            value /= np.sqrt(fan_in)
        elif name.endswith("scale"):
            value = 1 + 0.2 * value
        elif name.endswith("bias"):
            value *= 0.2
        out[name] = value.astype(np.float32)
    if zero_head:
        out["head/kernel"][:], out["head/bias"][:] = 0.0, -10.0
    return out


def save_google(path: Path, weights: dict[str, np.ndarray], *, root: str = "", **_: Any) -> Path:
    arrays = {root + name: value for name, value in weights.items()}
    if root.startswith("opt/"):
        arrays |= {
            f"opt/state/param_states/{name}/momentum": value + 1 for name, value in weights.items()
        }
        arrays["opt/state/step"] = np.array(10_000)
    elif root.startswith("params/img"):
        arrays |= {"params/txt/head/kernel": np.ones((3, 4)), "params/t": np.ones(1)}
    elif root.startswith("params/"):
        arrays |= {f"opt/0/mu/{name}": value + 1 for name, value in weights.items()}
        arrays["opt/0/count"] = np.array(7)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("name", GOOGLE)
def test_google_directly_and_converted(name, tmp_path):
    case: dict[str, Any] = GOOGLE[name]
    weights = google_weights(**case)
    path = save_google(tmp_path / "checkpoint.npz", weights, **case)
    x = pixels()
    want = google_forward(
        weights,
        x.transpose(0, 2, 3, 1),
        big_vision=case.get("big_vision", False),
        pool="tok" if case.get("cls", True) else "gap",
    )
    assert_close(run_torch(path, x), want, FLOAT64)
    report = convert(path, tmp_path / "hub")
    assert report.format_from == "google"
    assert report.verification is not None
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)
    if name in ("pre_logits", "big_vision", "big_vision, gap"):
        direct = load_flax(path)
        assert_close(run_flax(direct, x), want, FLOAT32)
        assert_same_model(load_flax(tmp_path / "hub"), direct)

    said = {note.field: note.value for note in report.set}
    assert said["hidden_act"] == "gelu_pytorch_tanh"
    assert said["layer_norm_eps"] == 1e-6
    assert said["position_resize"] == "bilinear_align_corners"
    assert said["num_attention_heads"] == 3
    assert report.preprocessing == "Google's (x - 127.5) / 127.5"
    table = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert (table["image_mean"], table["image_std"]) == ([0.5] * 3, [0.5] * 3)

    # Everything else in the file is accounted for, with a reason.
    with np.load(path) as file:
        names = set(file.files)
    root = case.get("root", "")
    assert set(report.ignored) == names - {root + n for n in weights}
    reasons = {
        "opt/target/": {"state of the optimizer"},
        "params/": {"state of the optimizer"},
        "params/img/": {"of a text tower", "outside 'params/img/', where the network is"},
    }
    assert set(report.ignored.values()) <= reasons.get(root, set())

    convert(tmp_path / "hub", tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back:
        again = {n.removeprefix("params/"): back[n] for n in back.files}
    # Where every token has a position it is a network of vision_transformer too, and written so.
    if not case.get("big_vision") or (case.get("cls", True) and "rows" not in case):
        assert set(again) == set(weights)
    for key in set(again) & set(weights):
        np.testing.assert_array_equal(again[key], weights[key], err_msg=key)
    assert sum(a.size for a in again.values()) == sum(a.size for a in weights.values())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            (name, size)
            for name in ("vision_transformer", "big_vision")
            for size in (48, (24, 56), 16)
        ),
        ("big_vision, gap", (24, 56)),
        # As where there is a class token: it has no position there either.
        *(pytest.param("big_vision, gap", size, marks=pytest.mark.slow) for size in (48, 16)),
    ],
)
def test_image_size_resamples_googles_positions_as_scipy_does(name, size, tmp_path):
    case: dict[str, Any] = GOOGLE[name]
    weights = google_weights(**case)
    save_google(tmp_path / "a.npz", weights, **case)
    convert(tmp_path / "a.npz", tmp_path / "hub", image_size=size)
    big_vision = case.get("big_vision", False)
    key = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    front, grid = (
        (weights[key][0, :1], weights[key][0, 1:])
        if not big_vision
        else (
            weights[key][0, :0],
            weights[key][0],
        )
    )
    height, width = (side // 8 for side in (size if isinstance(size, tuple) else (size, size)))
    # "nearest" is what scipy's default mode is meant to be; see test_positions.
    zoomed = scipy.ndimage.zoom(
        grid.reshape(4, 4, 48).astype(np.float64),
        (height / 4, width / 4, 1),
        order=1,
        mode="nearest",
    )
    want = np.concatenate([front, zoomed.reshape(-1, 48)])
    got = load_file(tmp_path / "hub" / "model.safetensors")["vit.embeddings.position_embeddings"]
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-6)


def test_bfloat16_stored_as_void(tmp_path):
    """What numpy makes of bfloat16 in an npz: bytes without a type."""
    weights = google_weights()
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    np.savez(tmp_path / "a.npz", **halves)
    with np.load(tmp_path / "a.npz") as file:
        assert file["cls"].dtype == np.dtype("V2")
    report = convert(tmp_path / "a.npz", tmp_path / "hub")
    assert report.dtype == "bfloat16"
    x = pixels()
    exact = {name: value.astype(np.float64) for name, value in halves.items()}
    want = google_forward(exact, x.transpose(0, 2, 3, 1), big_vision=False, pool="tok")
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)
    convert(tmp_path / "hub", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as file:
        for name, value in halves.items():
            assert file[name].tobytes() == value.tobytes()


def stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same network as big_vision saves it with `scan=True`: `flax.linen.scan` with
    `variable_axes={"params": 0}` puts the blocks on the first axis of their arrays."""
    out = {}
    for name, value in weights.items():
        match = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", name)
        if match is None:
            out[name] = value
        elif match[1] == "0":
            others = (f"Transformer/encoderblock_{i}/{match[2]}" for i in range(2))
            out[f"Transformer/encoderblock/{match[2]}"] = np.stack([weights[n] for n in others])
    return out


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("big_vision", np.savez),
        ("big_vision", np.savez_compressed),
        ("big_vision, image tower", np.savez),
        ("big_vision, no root", np.savez),
        ("big_vision, gap", np.savez),
        # How members are packed is not seen above the container.
        *(
            pytest.param(f"big_vision, {name}", np.savez_compressed, marks=pytest.mark.slow)
            for name in ("image tower", "no root", "gap")
        ),
    ],
)
def test_blocks_stacked_by_a_scan(name, save, tmp_path, monkeypatch):
    case: dict[str, Any] = GOOGLE[name]
    weights = google_weights(**case)
    save_google(tmp_path / "apart.npz", weights, **case)
    monkeypatch.setattr(np, "savez", save)
    path = save_google(tmp_path / "stacked.npz", stacked(weights), **case)
    convert(tmp_path / "apart.npz", tmp_path / "apart")
    report = convert(path, tmp_path / "hub")
    assert report.verification is not None
    wanted, given = (load_file(tmp_path / n / "model.safetensors") for n in ("apart", "hub"))
    assert wanted.keys() == given.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(given[key], value, err_msg=key)
    x = pixels()
    want = google_forward(
        weights,
        x.transpose(0, 2, 3, 1),
        big_vision=True,
        pool="tok" if case.get("cls", True) else "gap",
    )
    assert_close(run_torch(path, x), want, FLOAT64)
    with np.load(path) as file:
        root = case.get("root", "")
        assert set(report.ignored) == set(file.files) - {root + n for n in stacked(weights)}


def test_stacked_blocks_in_bfloat16(tmp_path):
    weights = stacked(google_weights(big_vision=True))
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    np.savez(tmp_path / "a.npz", **halves)
    convert(tmp_path / "a.npz", tmp_path / "hub")
    given = load_file(tmp_path / "hub" / "model.safetensors")
    name = "encoder.layer.1.intermediate.dense.weight"
    wanted = halves["Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"][1].T
    assert given[f"vit.{name}"].tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("count", r"must have the blocks as their first axis, as many in each; given .*\(3, 48\)"),
        ("twice", r"'Transformer/encoderblock_1/LayerNorm_0/bias' is also in the stack"),
        ("none", r"must have the blocks as their first axis"),
        ("many", r"must have the blocks as their first axis"),
        ("name", r"params/Transformer/encoderblock/LayerNorm_9/scale: nothing here knows"),
    ],
)
def test_stacks_that_are_refused(fault, message, tmp_path):
    weights = stacked(google_weights(big_vision=True))
    norm = "Transformer/encoderblock/LayerNorm_0/bias"
    if fault == "count":
        weights[norm] = np.ones((3, 48), np.float32)
    elif fault == "twice":
        weights["Transformer/encoderblock_1/LayerNorm_0/bias"] = np.ones(48, np.float32)
    elif fault == "name":
        weights["Transformer/encoderblock/LayerNorm_9/scale"] = np.ones((2, 48), np.float32)
    else:  # a number of blocks that takes no bytes
        count = {"none": 0, "many": 10**12}[fault]
        for name in [n for n in weights if n.startswith("Transformer/encoderblock/")]:
            weights[name] = np.empty((count, 0), np.float32)
    np.savez(tmp_path / "a.npz", **{f"params/{name}": w for name, w in weights.items()})
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.npz", tmp_path / "out")


def test_a_text_tower_alone_and_attention_pooling_are_refused(tmp_path):
    case: dict[str, Any] = {"big_vision": True, "cls": False, "root": "params/img/"}
    weights = google_weights(**case)
    weights["MAPHead_0/probe"] = np.ones((1, 1, 48), np.float32)
    save_google(tmp_path / "a.npz", weights, **case)
    with pytest.raises(CheckpointError, match=r"MAPHead_0/probe: nothing here knows"):
        convert(tmp_path / "a.npz", tmp_path / "out")


# -- the projects of facebookresearch and microsoft


def save_pickle(table: Any, path: Path) -> Path:
    torch.save(table, path)
    return path


def dino_file(state: dict[str, Any], path: Path, teacher: str = "backbone.") -> Path:
    """A training state of DINO, as main_dino.py saves it."""
    head = {
        "head.mlp.0.weight": torch.ones(9, 48),
        "head.mlp.0.bias": torch.ones(9),
        "head.last_layer.weight_g": torch.ones(5, 1),
        "head.last_layer.weight_v": torch.ones(5, 9),
    }
    module = "module." if teacher.startswith("module") else ""
    return save_pickle(
        {
            "student": {f"module.backbone.{n}": v + 1 for n, v in state.items()}
            | {f"module.{n}": v for n, v in head.items()},
            "teacher": {f"{teacher}{n}": v for n, v in state.items()}
            | {f"{module}{n}": v for n, v in head.items()},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
            "epoch": 100,
            "dino_loss": {"center": torch.zeros(1, 5)},
        },
        path,
    )


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
def test_dino(prefix, tmp_path):
    model = randomise(timm.create_model(VIT, **{**SMALL, "num_classes": 0, "num_heads": 3}))
    path = dino_file(model.state_dict(), tmp_path / "checkpoint.pth", prefix)
    heads = {"num_attention_heads": 3}
    report = convert(path, tmp_path / "hub", overrides=heads)
    assert (report.format_from, report.family) == ("dino", "vit")
    wrapped = torch.load(path, weights_only=True)
    reasons = set(report.ignored.values())
    assert "the student of DINO's training; the teacher is taken" in reasons
    assert "the projection head of DINO's training" in reasons | {
        why.replace("a head or loss of pretraining", "the projection head of DINO's training")
        for why in reasons
    }
    assert "state of the optimizer" in reasons
    assert report.ignored["dino_loss/center"]
    assert report.tensors_read == len(model.state_dict())
    assert sum(len(wrapped[k]) for k in ("student", "teacher")) + 2 == (
        report.tensors_read + len(report.ignored)
    )
    x = pixels()
    want = run_peer(model.double(), x)  # the normed class token
    for place, options in ((path, heads), (tmp_path / "hub", {})):
        ours = vit_torch.AutoModel.from_pretrained(
            place, dtype=torch.float64, add_pooling_layer=False, **options
        ).eval()
        with torch.no_grad():
            got = ours(torch.tensor(x)).last_hidden_state[:, 0].numpy()
        assert_close(got, want, FLOAT64)
    flax = vit_flax.FlaxAutoModel.from_pretrained(
        tmp_path / "hub", precision="highest", add_pooling_layer=False
    )
    got = np.asarray(flax(jnp.asarray(x, jnp.float32)).last_hidden_state[:, 0])
    assert_close(got, want, FLOAT32)


@pytest.mark.parametrize("size", [(48, 48), (24, 56)])
def test_dinos_positions_are_resampled_by_scale_factors_with_an_offset(size, tmp_path):
    model = randomise(timm.create_model(VIT, **{**SMALL, "num_classes": 0}))
    path = save_pickle(
        {"teacher": {f"backbone.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "a.pth"
    )
    convert(path, tmp_path / "hub", overrides={"num_attention_heads": 4}, image_size=size)
    got = load_file(tmp_path / "hub" / "model.safetensors")["embeddings.position_embeddings"]
    positions = model.pos_embed.detach().double()
    grid = positions[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    scale = tuple((side // 8 + 0.1) / 4 for side in size)
    zoomed = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
    assert zoomed.shape[2:] == (size[0] // 8, size[1] // 8)
    want = torch.cat([positions[:, :1], zoomed.flatten(2).transpose(1, 2)], 1)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_deit(distilled, tmp_path):
    architecture = DISTILLED if distilled else "deit_tiny_patch16_224"
    model = randomise(timm.create_model(architecture, **SMALL))
    path = save_pickle({"model": model.state_dict()}, tmp_path / "deit.pth")
    heads = {"num_attention_heads": 4}
    report = convert(path, tmp_path / "hub", overrides=heads)
    assert report.format_from == "deit"
    assert report.family == ("deit" if distilled else "vit")
    stem = "DeiT" if distilled else "ViT"
    assert report.architecture == f"{stem}ForImageClassification" + "WithTeacher" * distilled
    x = pixels()
    want = run_peer(model.double(), x)  # the mean of both heads, where there are two
    assert_close(run_torch(path, x, **heads), want, FLOAT64)
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)
    assert_close(run_flax(load_flax(path, **heads), x), want, FLOAT32)
    convert(tmp_path / "hub", tmp_path / "again.pth", to="deit")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert set(again) == set(model.state_dict())
    for name, value in model.float().state_dict().items():
        assert torch.equal(again[name], value), name


DINOV2 = {
    "dinov2": ({}, False),
    "gated": ({"use_swiglu_ffn": True}, False),
    "registers": ({"num_register_tokens": 3}, False),
    "gated, registers, chunks": ({"use_swiglu_ffn": True, "num_register_tokens": 3}, True),
    "chunks": ({}, True),
}


def dinov2_state(model: Any, chunks: bool) -> dict[str, torch.Tensor]:
    """The state of a Transformers model by the names of facebookresearch."""
    theirs = model.state_dict()
    out = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "mask_token": theirs["embeddings.mask_token"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    if "embeddings.register_tokens" in theirs:
        out["register_tokens"] = theirs["embeddings.register_tokens"]
    for i in range(4):
        layer = f"encoder.layer.{i}"
        block = f"blocks.{i // 2}.{i}" if chunks else f"blocks.{i}"
        out[f"{block}.ls1.gamma"] = theirs[f"{layer}.layer_scale1.lambda1"]
        out[f"{block}.ls2.gamma"] = theirs[f"{layer}.layer_scale2.lambda1"]
        for leaf in ("weight", "bias"):
            attention = f"{layer}.attention.attention"
            out[f"{block}.attn.qkv.{leaf}"] = torch.cat(
                [theirs[f"{attention}.{n}.{leaf}"] for n in ("query", "key", "value")]
            )
            out[f"{block}.attn.proj.{leaf}"] = theirs[f"{layer}.attention.output.dense.{leaf}"]
            out[f"{block}.norm1.{leaf}"] = theirs[f"{layer}.norm1.{leaf}"]
            out[f"{block}.norm2.{leaf}"] = theirs[f"{layer}.norm2.{leaf}"]
            for ours, name in (
                ("w12", "weights_in"),
                ("w3", "weights_out"),
                ("fc1", "fc1"),
                ("fc2", "fc2"),
            ):
                if f"{layer}.mlp.{name}.{leaf}" in theirs:
                    out[f"{block}.mlp.{ours}.{leaf}"] = theirs[f"{layer}.mlp.{name}.{leaf}"]
    return out


@pytest.mark.parametrize("name", DINOV2)
def test_dinov2(name, tmp_path):
    fields, chunks = DINOV2[name]
    family = "Dinov2WithRegisters" if "num_register_tokens" in fields else "Dinov2"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=8,
        attn_implementation="eager", **fields,
    )  # fmt: skip
    model = randomise(getattr(transformers, f"{family}Model")(config))
    state = dinov2_state(model, chunks)
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in model.parameters())
    path = save_pickle(state, tmp_path / "dinov2_pretrain.pth")
    heads = {"num_attention_heads": 3}
    report = convert(path, tmp_path / "hub", overrides=heads)
    assert report.format_from == "dinov2"
    assert report.family == ("dinov2_with_registers" if "registers" in name else "dinov2")
    x = pixels()
    model.double()

    def reference(images):
        with torch.no_grad():
            return model(torch.tensor(images)).pooler_output.numpy()

    for place, options in ((path, heads), (tmp_path / "hub", {})):
        got = run_torch(place, x, auto="AutoModel", **options)
        # The reference takes the softmax in float32.
        assert_close(got, reference(x), 1e-6)

    # Another size, with positions as the project's own code resamples them.
    positions = model.embeddings.position_embeddings.detach()
    grid = positions[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    how = (
        {"size": (6, 6), "antialias": True}
        if "registers" in name
        else {"scale_factor": (6.1 / 4, 6.1 / 4)}
    )
    zoomed = torch.nn.functional.interpolate(grid, mode="bicubic", **how)
    positions = torch.cat([positions[:, :1], zoomed.flatten(2).transpose(1, 2)], 1)
    larger = type(model)(type(config)(**{**config.to_dict(), "image_size": 48})).double().eval()
    larger.load_state_dict(
        {**model.state_dict(), "embeddings.position_embeddings": positions}, strict=True
    )
    with torch.no_grad():
        want = larger(torch.tensor(pixels(LARGER))).pooler_output.numpy()
    got = run_torch(tmp_path / "hub", pixels(LARGER), auto="AutoModel")
    assert_close(got, want, 1e-6)
    assert_close(
        run_flax(load_flax(tmp_path / "hub", auto="FlaxAutoModel"), x), reference(x), FLOAT32
    )
    # Transformers itself reads what was written.
    again = type(model).from_pretrained(tmp_path / "hub")
    for key, value in model.float().state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    convert(tmp_path / "hub", tmp_path / "again.pth", to="dinov2")
    unchunked = dinov2_state(model, False)
    written = torch.load(tmp_path / "again.pth", weights_only=True)
    assert set(written) == set(unchunked)
    assert all(torch.equal(written[n], v) for n, v in unchunked.items())


DECODER = {
    "mask_token": (1, 1, 32),
    "decoder_pos_embed": (1, 17, 32),
    "decoder_embed.weight": (32, 48),
    "decoder_embed.bias": (32,),
    "decoder_blocks.0.norm1.weight": (32,),
    "decoder_blocks.0.attn.qkv.weight": (96, 32),
    "decoder_norm.weight": (32,),
    "decoder_pred.weight": (192, 32),
    "decoder_pred.bias": (192,),
}


def test_mae_pretrained(tmp_path):
    model = randomise(timm.create_model(VIT, **{**SMALL, "num_classes": 0}))
    state = {**model.state_dict(), **{n: torch.ones(s) for n, s in DECODER.items()}}
    path = save_pickle({"model": state}, tmp_path / "mae.pth")
    report = convert(path, tmp_path / "hub", overrides={"num_attention_heads": 4})
    assert report.format_from == "mae"
    assert set(report.ignored) == {f"model/{name}" for name in DECODER}
    assert all("decoder" in why for why in report.ignored.values())
    ours = vit_torch.AutoModel.from_pretrained(
        tmp_path / "hub", dtype=torch.float64, add_pooling_layer=False
    ).eval()
    x = pixels()
    with torch.no_grad():
        got = ours(torch.tensor(x)).last_hidden_state[:, 0].numpy()
    assert_close(got, run_peer(model.double(), x), FLOAT64)


def test_mae_finetuned(tmp_path):
    """The classifier of MAE looks at the norm of the mean."""
    model = randomise(timm.create_model(VIT, **SMALL, global_pool="avg"))
    path = save_pickle({"model": model.state_dict()}, tmp_path / "mae_finetuned.pth")
    report = convert(path, tmp_path / "hub", overrides={"num_attention_heads": 4})
    assert report.format_from == "mae"
    x = pixels()
    want = run_peer(model.double(), x)
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)
    assert_close(run_flax(load_flax(tmp_path / "hub"), x), want, FLOAT32)


def test_vit_mae_of_the_hub(tmp_path):
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        image_size=32, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=40, mask_ratio=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = randomise(transformers.ViTMAEForPreTraining(config))
    model.save_pretrained(tmp_path / "mae")
    report = convert(tmp_path / "mae", tmp_path / "hub")
    assert (report.format_from, report.family) == ("hub", "vit")
    assert set(report.ignored) == {n for n in model.state_dict() if n.startswith("decoder.")}
    x = pixels()
    model.double()
    with torch.no_grad():
        # Nothing masked, and the patches in their order.
        order = torch.arange(16.0).repeat(2, 1)
        want = model.vit(torch.tensor(x), noise=order).last_hidden_state.numpy()
    for place in (tmp_path / "mae", tmp_path / "hub"):
        ours = vit_torch.AutoModel.from_pretrained(
            place, dtype=torch.float64, add_pooling_layer=False
        ).eval()
        with torch.no_grad():
            assert_close(ours(torch.tensor(x)).last_hidden_state.numpy(), want, 1e-6)
    flax = vit_flax.FlaxAutoModel.from_pretrained(
        tmp_path / "mae", precision="highest", add_pooling_layer=False
    )
    got = np.asarray(flax(jnp.asarray(x, jnp.float32)).last_hidden_state)
    assert_close(got, want, FLOAT32)


def test_a_vit_without_biases_is_no_beit(tmp_path):
    model = make_timm("no qkv bias")
    path = save_pickle({"model": dict(model.state_dict())}, tmp_path / "deit.pth")
    report = convert(path, tmp_path / "hub", overrides={"num_attention_heads": 4})
    assert (report.format_from, report.family) == ("deit", "vit")
    x = pixels()
    assert_close(run_torch(tmp_path / "hub", x), run_peer(model.double(), x), FLOAT64)


def test_microsoft_beit_finetuned(tmp_path):
    model = make_timm("beit")
    state = dict(model.state_dict())
    for i in range(2):  # timm does not keep these in its files; microsoft does
        state[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    path = save_pickle({"model": state, "optimizer": {"state": {}}}, tmp_path / "beit_ft22k.pth")
    report = convert(path, tmp_path / "hub")
    assert (report.format_from, report.family) == ("beit", "beit")
    assert set(report.ignored) == {
        f"model/blocks.{i}.attn.relative_position_index" for i in range(2)
    }
    x = pixels()
    want = run_peer(model.double(), x)
    assert_close(run_torch(path, x), want, FLOAT64)
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)
    assert_close(run_flax(load_flax(tmp_path / "hub"), x), want, FLOAT32)


def test_microsoft_beit_pretrained(tmp_path):
    """Visual tokens; the bias of relative positions is one table for all blocks."""
    config = transformers.BeitConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        image_size=32, patch_size=8, vocab_size=11, use_mask_token=True,
        use_shared_relative_position_bias=True, attn_implementation="eager",
    )  # fmt: skip
    model = randomise(transformers.BeitForMaskedImageModeling(config))
    theirs = model.state_dict()
    bias = "relative_position_bias.relative_position_bias_table"
    state = {
        "cls_token": theirs["beit.embeddings.cls_token"],
        "mask_token": theirs["beit.embeddings.mask_token"],
        "rel_pos_bias.relative_position_bias_table": theirs[f"beit.encoder.{bias}"],
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
    }
    for leaf in ("weight", "bias"):
        state[f"patch_embed.proj.{leaf}"] = theirs[
            f"beit.embeddings.patch_embeddings.projection.{leaf}"
        ]
        state[f"norm.{leaf}"] = theirs[f"layernorm.{leaf}"]
        state[f"lm_head.{leaf}"] = theirs[f"lm_head.{leaf}"]
    for i in range(2):
        layer, block = f"beit.encoder.layer.{i}", f"blocks.{i}"
        attention = f"{layer}.attention.attention"
        state |= {
            f"{block}.gamma_1": theirs[f"{layer}.lambda_1"],
            f"{block}.gamma_2": theirs[f"{layer}.lambda_2"],
            f"{block}.attn.q_bias": theirs[f"{attention}.query.bias"],
            f"{block}.attn.v_bias": theirs[f"{attention}.value.bias"],
            f"{block}.attn.qkv.weight": torch.cat(
                [theirs[f"{attention}.{n}.weight"] for n in ("query", "key", "value")]
            ),
        }
        for leaf in ("weight", "bias"):
            state |= {
                f"{block}.attn.proj.{leaf}": theirs[f"{layer}.attention.output.dense.{leaf}"],
                f"{block}.norm1.{leaf}": theirs[f"{layer}.layernorm_before.{leaf}"],
                f"{block}.norm2.{leaf}": theirs[f"{layer}.layernorm_after.{leaf}"],
                f"{block}.mlp.fc1.{leaf}": theirs[f"{layer}.intermediate.dense.{leaf}"],
                f"{block}.mlp.fc2.{leaf}": theirs[f"{layer}.output.dense.{leaf}"],
            }
    path = save_pickle({"model": state}, tmp_path / "beit_pt.pth")
    report = convert(path, tmp_path / "hub")
    assert (report.format_from, report.architecture) == ("beit", "BeitForMaskedImageModeling")
    x, mask = pixels(), torch.arange(32).reshape(2, 16) % 3 == 0
    model.double()
    with torch.no_grad():
        want = model(torch.tensor(x), bool_masked_pos=mask).logits.numpy()
        ours = vit_torch.BeitForMaskedImageModeling.from_pretrained(
            tmp_path / "hub", dtype=torch.float64
        ).eval()
        got = ours(torch.tensor(x), bool_masked_pos=mask).logits.numpy()
    assert_close(got, want, 1e-6)  # the reference takes the softmax in float32
    again = type(model).from_pretrained(tmp_path / "hub").state_dict()
    for key, value in model.float().state_dict().items():
        assert torch.equal(again[key], value), key


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
