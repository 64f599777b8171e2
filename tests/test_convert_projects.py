"""The converter against the checkpoints of DINO, DeiT, DINOv2, MAE and BEiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from format_files import DISTILLED, SMALL, VIT, make_timm, save_pickle
from peers import (
    FLOAT32,
    FLOAT64,
    LARGER,
    assert_close,
    load_flax,
    pixels,
    randomise,
    run_flax,
    run_peer,
    run_torch,
)
from safetensors.numpy import load_file
from timm_models import timm

import vit_flax
import vit_torch
from vit_convert.convert import convert

# -- the projects of facebookresearch and microsoft


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
