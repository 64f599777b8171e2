"""The converter against Google's checkpoints, whose forward pass is written out here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
from format_files import gelu_tanh
from peers import (
    FLOAT32,
    FLOAT64,
    assert_close,
    assert_same_model,
    load_flax,
    pixels,
    run_flax,
    run_torch,
)
from safetensors.numpy import load_file

from vit_common.errors import CheckpointError
from vit_convert.convert import convert

# -- Google


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


def test_a_text_tower_alone_and_a_part_of_attention_pooling_are_refused(tmp_path):
    case: dict[str, Any] = {"big_vision": True, "cls": False, "root": "params/img/"}
    weights = google_weights(**case)
    weights["MAPHead_0/probe"] = np.ones((1, 1, 48), np.float32)
    save_google(tmp_path / "a.npz", weights, **case)
    with pytest.raises(CheckpointError, match=r"pooler\.attention\.query\.weight: missing"):
        convert(tmp_path / "a.npz", tmp_path / "out")
