"""Hybrids: a ResNet before the patches. References: timm 1.0.31, and Google's forward pass, written
out here with Flax's own layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peers import FLOAT32, RESIZED, assert_close, load_flax, pixels, randomise, run_flax, run_torch
from safetensors.numpy import load_file, save_file
from test_convert_google import google_forward, google_weights
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, ConfigError, InputError
from vit_common.families import AutoConfig
from vit_common.flops import multiply_adds
from vit_common.parameters import parameter_shapes
from vit_convert.convert import convert

SIZES: dict[str, Any] = {
    "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5,
}  # fmt: skip


def hybrid(depths: tuple[int, ...], width: int = 32, **more: Any) -> Any:
    """timm's hybrid with a ResNet of these depths, as `vision_transformer_hybrid.py` builds it."""
    convolution = partial(timm.layers.StdConv2dSame, eps=1e-8)
    backbone = timm.models.ResNetV2(
        layers=depths,
        channels=tuple(4 * width * 2**i for i in range(len(depths))),
        stem_chs=width,
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=convolution,
    )
    model = timm.models.VisionTransformer(
        embed_layer=partial(timm.layers.HybridEmbed, backbone=backbone),
        **{"img_size": 32, "patch_size": 1, "dynamic_img_size": True, **SIZES, **more},
    )
    return randomise(model)


def root_alone() -> Any:
    name = "vit_tiny_r_s16_p8_224"
    return randomise(timm.create_model(name, img_size=64, dynamic_img_size=True, **SIZES))


def saved(model: Any, place: Any) -> Any:
    place.mkdir()
    save_file(
        {name: value.numpy() for name, value in model.state_dict().items()},
        place / "model.safetensors",
        {"format": "pt"},
    )
    return place / "model.safetensors"


KINDS = {
    "stages": (lambda: hybrid((2, 1)), (32, 32), (24, 40)),
    "larger patches": (lambda: hybrid((1,), patch_size=2), (32, 32), (16, 40)),
    "four stages": (lambda: hybrid((1, 1, 1, 1)), (32, 32), (32, 64)),
    "root alone": (root_alone, (64, 64), (32, 96)),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("larger patches", "four stages") else []
        )
        for name in KINDS
    ],
)
def test_hybrids_of_timm_in_both_twins(kind, tmp_path):
    make, native, other = KINDS[kind]
    source, heads = saved(make(), tmp_path / "timm"), {"num_attention_heads": 2}
    x, more = pixels(native), pixels(other, 1)
    peer = make().double()
    with torch.no_grad():
        want, resized = (peer(torch.tensor(images)).numpy() for images in (x, more))
    assert_close(run_torch(source, x, **heads), want, 1e-12)
    assert_close(run_torch(source, more, **heads), resized, RESIZED)
    with jax.enable_x64(True):
        model = load_flax(source, dtype=jnp.float64, param_dtype=jnp.float64, **heads)
        assert_close(np.asarray(model(x).logits), want, 1e-12)
        assert model.config.stem_standardization == "variance"

    report = convert(source, tmp_path / "flax", to="flax", overrides=heads)
    assert report.format_from == "timm"
    assert report.verification is not None
    assert not report.ignored
    assert_close(run_torch(tmp_path / "flax", x), want, 1e-12)
    if kind == "root alone":
        convert(tmp_path / "flax", tmp_path / "back", to="timm")
        again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).double()
        with torch.no_grad():
            assert_close(again.eval()(torch.tensor(x)).numpy(), want, 1e-12)
        first, again = load_file(source), load_file(tmp_path / "back" / "model.safetensors")
        assert first.keys() == again.keys()
        assert all(np.array_equal(first[name], again[name]) for name in first)
    else:  # timm has no hybrid of those sizes
        with pytest.raises(InputError, match="timm builds hybrids only with"):
            convert(tmp_path / "flax", tmp_path / "back", to="timm")


def vitamin() -> Any:
    """timm's ViTamin, narrow, as `vitamin.py` builds it."""
    module = timm.models.vitamin
    sizes = module.VitCfg(embed_dim=(32, 64, 16), depths=(2, 1, 1), stem_width=32)
    backbone = module.MbConvStages(cfg=sizes)
    return randomise(
        timm.models.VisionTransformer(
            **{**SIZES, "depth": 2},
            img_size=(32, 48),
            patch_size=1,
            dynamic_img_size=True,
            class_token=False,
            global_pool="avg",
            mlp_layer=module.GeGluMlp,
            embed_layer=partial(timm.layers.HybridEmbed, backbone=backbone, proj=False),
        )
    )


def test_vitamin_in_both_twins(tmp_path):
    model = vitamin()
    source = saved(model, tmp_path / "timm")
    known = {"num_attention_heads": 2, "image_size": (32, 48)}
    peer = model.double().eval()
    for size, bound in (((32, 48), 1e-12), ((48, 32), RESIZED)):
        x = pixels(size)
        with torch.no_grad():
            want = peer(torch.tensor(x)).numpy()
        assert_close(run_torch(source, x, **known), want, bound)
    x = pixels((32, 48))
    want = run_torch(source, x, **known)
    with jax.enable_x64(True):
        model = load_flax(source, dtype=jnp.float64, param_dtype=jnp.float64, **known)
        assert_close(np.asarray(model(x).logits), want, 1e-12)
    assert (model.config.stem_type, model.config.gate_act) == ("mbconv", "gelu")
    report = convert(source, tmp_path / "flax", to="flax", overrides=known)
    assert (report.format_from, report.ignored) == ("timm", {})
    assert report.verification is not None
    convert(tmp_path / "flax", tmp_path / "hub")
    assert_close(run_torch(tmp_path / "hub", x), want, 1e-12)
    with pytest.raises(InputError, match="ViTamins of the published widths only"):
        convert(tmp_path / "hub", tmp_path / "back", to="timm")


def with_statistics(model: Any) -> Any:
    """A network in float64 whose batch norms have random statistics."""
    randomise(model)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_()
            elif name.endswith("running_var"):
                value.uniform_(0.2, 2.0)
    return model.double().eval()


def resnetd() -> Any:
    """timm's hybrid with a ResNet-D, narrow, as `vit_small_resnet26d_224` is built."""
    backbone = timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (2, 1, 1, 1), stem_width=32, stem_type="deep", avg_down=True
    )
    features = timm.models.FeatureListNet(backbone, out_indices=(2,))
    stem = partial(timm.layers.HybridEmbed, backbone=features)
    sizes = {"img_size": (32, 48), "patch_size": 1, "dynamic_img_size": True}
    return with_statistics(timm.models.VisionTransformer(**SIZES, **sizes, embed_layer=stem))


def mobileclip() -> Any:
    """timm's MobileCLIP, narrow, as `vit_base_mci_224` is built."""
    backbone = timm.models.vision_transformer_hybrid.ConvStem(
        channels=(32, 32, 16),
        stride=(4, 2, 2),
        kernel_size=(4, 2, 2),
        padding=0,
        act_layer=torch.nn.GELU,
    )
    model = timm.models.VisionTransformer(
        **SIZES,
        img_size=(32, 48),
        patch_size=1,
        dynamic_img_size=True,
        no_embed_class=True,
        embed_layer=partial(timm.layers.HybridEmbed, backbone=backbone, proj=False),
    )
    return with_statistics(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind", "counters"),
    [
        (mobileclip, "convolutions", 2),
        pytest.param(resnetd, "resnetd", 14, marks=pytest.mark.slow),
    ],
)
def test_stems_with_batch_norms_in_both_twins(make, kind, counters, tmp_path):
    """They are folded into the convolutions; timm's are not."""
    peer = make()
    source = saved(peer, tmp_path / "timm")
    known = {"num_attention_heads": 2, "image_size": (32, 48)}
    for size, bound in (((32, 48), 1e-12), ((48, 32), RESIZED)):
        x = pixels(size)
        with torch.no_grad():
            want = peer(torch.tensor(x)).numpy()
        assert_close(run_torch(source, x, **known), want, bound)
    x = pixels((32, 48))
    want = run_torch(source, x, **known)
    with jax.enable_x64(True):
        model = load_flax(source, dtype=jnp.float64, param_dtype=jnp.float64, **known)
        assert_close(np.asarray(model(x).logits), want, 1e-12)
    assert model.config.stem_type == kind
    report = convert(source, tmp_path / "flax", to="flax", overrides=known)
    assert report.verification is not None
    assert len(report.ignored) == counters  # of the training of the batch norms
    convert(tmp_path / "flax", tmp_path / "hub")
    assert_close(run_torch(tmp_path / "hub", x), want, 1e-12)
    with pytest.raises(InputError, match="batch norms, which are folded here"):
        convert(tmp_path / "hub", tmp_path / "back", to="timm")


@pytest.mark.parametrize(
    "name", ["vitamin_small_224", pytest.param("vitamin_large_336", marks=pytest.mark.slow)]
)
def test_published_sizes_of_vitamin(name):
    with torch.device("meta"):
        peer = timm.create_model(name)
    stem, block = peer.patch_embed.backbone.stem, peer.blocks[0]
    config = ViTConfig(
        hidden_size=peer.embed_dim,
        num_hidden_layers=len(peer.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.w0.out_features,
        image_size=peer.patch_embed.img_size,
        stem_type="mbconv",
        stem_depths=(2, 4),
        stem_width=stem.out_chs,
        use_cls_token=False,
        pooling="mean",
        norm_after_pooling=True,
        use_swiglu_ffn=True,
        gate_act="gelu",
        use_mlp_input_norm=True,
        num_labels=peer.num_classes,
    )
    shapes = parameter_shapes(config, "classifier").values()
    assert sum(map(math.prod, shapes)) == sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"patch_size": 32}, "`patch_size` must be 16"),
        ({"use_patch_bias": False}, "`use_patch_bias` must be True"),
        ({"stem_width": 40}, "multiple of 32"),
    ],
)
def test_sizes_that_no_vitamin_has(fields, why):
    with pytest.raises(ConfigError, match=why):
        ViTConfig(**{"stem_type": "mbconv", "stem_depths": (1, 1), "stem_width": 32, **fields})


class Unit(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def convolve(x, name, features, size, stride):
            x = StandardizedConv(features, (size, size), (stride, stride), use_bias=False,
                                 name=f"conv{name}")(x)  # fmt: skip
            return nn.GroupNorm(name=f"gn{name}", use_fast_variance=False)(x)

        residual, wide = x, 4 * self.features
        if x.shape[-1] != wide or self.stride != 1:
            residual = convolve(x, "_proj", wide, 1, self.stride)
        y = nn.relu(convolve(x, "1", self.features, 1, 1))
        y = nn.relu(convolve(y, "2", self.features, 3, self.stride))
        return nn.relu(residual + convolve(y, "3", wide, 1, 1))


class StandardizedConv(nn.Conv):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        centred = value - jnp.mean(value, (0, 1, 2))
        return centred / (jnp.std(centred, (0, 1, 2)) + 1e-5)


class Root(nn.Module):
    """Google's ResNet: linen's defaults (32 groups, epsilon 1e-6, "SAME")."""

    width: int
    depths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        x = StandardizedConv(self.width, (7, 7), (2, 2), use_bias=False, name="conv_root")(x)
        x = nn.relu(nn.GroupNorm(name="gn_root", use_fast_variance=False)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                stride = 2 if i and j == 0 else 1
                unit = Unit(self.width * 2**i, stride, name=f"block{i + 1}_unit{j + 1}")
                x = unit(x)
        return x


def test_hybrids_of_google(tmp_path):
    root, rng = Root(32, (1, 1)), np.random.default_rng(5)
    images = pixels((32, 32))
    with jax.enable_x64(True):
        x = jnp.asarray(images.transpose(0, 2, 3, 1))
        shapes = jax.eval_shape(root.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        # Small kernels: the constant that is added to their deviation counts.
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * np.float32(1e-3) if "kernel" in str(path) else leaf, params
        )
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        features = np.asarray(jax.jit(root.apply)({"params": wide}, x))  # (B, 4, 4, 256)
    weights = google_weights()
    D = weights["embedding/kernel"].shape[-1]
    weights["embedding/kernel"] = rng.normal(size=(1, 1, 256, D)).astype(np.float32) / 16
    want = google_forward(weights, features, big_vision=False, pool="token")
    from flax.traverse_util import flatten_dict

    for name, value in flatten_dict(params, sep="/").items():
        name = name.replace("_unit", "/unit")
        # As Flax had group norms before linen.
        weights[name] = value.reshape(1, 1, 1, -1) if value.ndim == 1 else value
    np.savez(tmp_path / "R50_ViT-B_16.npz", **weights)

    report = convert(tmp_path / "R50_ViT-B_16.npz", tmp_path / "hub")
    assert report.format_from == "google"
    assert not report.ignored
    config = ViTConfig.from_pretrained(tmp_path / "hub")
    assert (config.stem_depths, config.stem_standardization) == ((1, 1), "deviation")
    assert (config.stem_norm_eps, config.patch_size) == (1e-6, 8)
    assert_close(run_torch(tmp_path / "hub", images), want, 1e-10)
    assert_close(run_flax(load_flax(tmp_path / "hub"), images), want, FLOAT32)

    convert(tmp_path / "hub", tmp_path / "back.npz", to="google")
    back = np.load(tmp_path / "back.npz")
    assert set(back) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_a_hybrid_that_lacks_blocks_is_refused(tmp_path):
    state = hybrid((1, 1)).state_dict()
    state = {name: value.numpy() for name, value in state.items() if "stages.0" not in name}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="blocks of the stem are missing"):
        vit_torch.ViTModel.from_pretrained(tmp_path / "model.safetensors", num_attention_heads=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem_width": 48}, "`stem_width` must be a multiple of 32"),
        ({"patch_size": 4}, "`patch_size` must be a multiple of the stem's stride"),
        ({"image_size": 40}, "`image_size` one of `patch_size`"),
        ({"stem_depths": (1, 0)}, "`stem_depths` must be a list of at most four"),
        ({"stem_type": "resnet"}, "`stem_type` must be one of 'resnetv2'"),
    ],
)
def test_stems_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        ViTConfig(**{"stem_type": "resnetv2", "stem_depths": (1, 1), "image_size": 64, **fields})


def test_published_sizes_and_operations():
    """Numbers of parameters are timm's own (`vit_base_r50_s16_384`, 1000 classes)."""
    config = ViTConfig(stem_type="resnetv2", stem_depths=(3, 4, 9), image_size=384, num_labels=1000)
    model = vit_flax.FlaxViTForImageClassification(config, _do_init=False)
    shapes = model.params_shape_tree
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 98_950_952
    # The convolutions are counted one by one by a hook on timm's.
    total = []
    convolve = torch.nn.functional.conv2d

    def counted(x, weight, *args):
        out = convolve(x, weight, *args)
        total.append(out[0].numel() * weight[0].numel())
        return out

    peer = hybrid((2, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", counted)
        peer(torch.zeros(1, 3, 32, 32))
    one = {"stem_type": "resnetv2", "stem_depths": (2, 1), "stem_width": 32, "image_size": 32}
    sizes = {"hidden_size": 16, "num_hidden_layers": 0, "patch_size": 8, "num_attention_heads": 2}
    config = ViTConfig(**one, **sizes)
    assert multiply_adds(config, None) == sum(total)


def vit_hybrid(**backbone: Any) -> Any:
    """Transformers' ViTHybrid of the smallest ResNet."""
    from transformers.modeling_utils import no_init_weights
    from transformers.models.deprecated.vit_hybrid import modeling_vit_hybrid as theirs

    config = theirs.ViTHybridConfig(
        backbone_config={
            "global_padding": "same",
            "layer_type": "bottleneck",
            "depths": [1, 1],
            "hidden_sizes": [128, 256],
            "embedding_size": 32,
            "out_features": ["stage2"],
            "embedding_dynamic_padding": True,
            **backbone,
        },
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        backbone_featmap_shape=[1, 256, 4, 4],
        num_labels=5,
        attn_implementation="eager",
    )
    with no_init_weights():  # its own fails, for want of a mask token
        return randomise(theirs.ViTHybridForImageClassification(config))


@pytest.mark.slow  # importing it takes seconds
def test_hybrids_of_transformers(tmp_path):
    model, x = vit_hybrid(), pixels((32, 32))
    model.save_pretrained(tmp_path / "hub")
    with torch.no_grad():
        want = model.double()(torch.tensor(x)).logits.numpy()
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT32)  # its softmax is in float32
    report = convert(tmp_path / "hub", tmp_path / "flax", to="flax")
    assert not report.ignored
    config = ViTConfig.from_pretrained(tmp_path / "flax")
    assert (config.stem_depths, config.patch_size, config.stem_width) == ((1, 1), 8, 32)


@pytest.mark.parametrize(
    "backbone", [{"layer_type": "preactivation"}, {"global_padding": None}, {"width_factor": 2}]
)
def test_other_resnets_of_transformers_are_refused(backbone):
    table = {"model_type": "vit-hybrid", "backbone_config": {"layer_type": "bottleneck",
             "global_padding": "same", "embedding_dynamic_padding": True, **backbone}}  # fmt: skip
    with pytest.raises(
        ConfigError, match=f"the ResNet of this hybrid has .*{next(iter(backbone))}"
    ):
        AutoConfig.from_dict(table)
