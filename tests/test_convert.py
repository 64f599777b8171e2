"""The engine of the converter, its tables, and a real network in a foreign layout."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import InMemory, make_config, random_weights
from PIL import Image
from tolerances import BOUNDS

from vit_common.errors import CheckpointError
from vit_common.parameters import parameter_shapes
from vit_common.presets import PRESETS, preset
from vit_convert.detect import detect_format
from vit_convert.formats import FORMATS, table_for
from vit_convert.layouts import FUSED_QKV, HWIO, KEEP, TRANSPOSE, result_shapes
from vit_convert.rules import Format, Rule, to_canonical, to_foreign

DEIT_TINY = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny"
HEADS = [None, "classifier", "decoder"]


TIMM = table_for("timm", make_config())
HUB_V5 = next(t for t in FORMATS if "v5" in t.describes and "vit" in t.families)


def in_memory(arrays):
    return {name: InMemory(array) for name, array in arrays.items()}


def read(mapped):
    return {name: tensor.read() for name, tensor in mapped.tensors.items()}


# -- layouts


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (KEEP, [(3,)]),
        (TRANSPOSE, [(3, 5)]),
        (HWIO, [(2, 3, 5, 7)]),
        (FUSED_QKV, [(6, 5)]),
        (FUSED_QKV, [(9,)]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_layouts_go_there_and_back(layout, shapes):
    rng = np.random.default_rng(0)
    foreign = [rng.normal(size=shape) for shape in shapes]
    canonical = layout.to_canonical(foreign)
    assert [a.shape for a in canonical] == result_shapes(layout.to_canonical, shapes)
    back = layout.to_foreign(canonical)
    for a, b in zip(foreign, back, strict=True):
        np.testing.assert_array_equal(a, b)


def test_layouts_are_those_of_torch_and_jax():
    """Against what the frameworks compute: a dense layer and a convolution."""
    import jax

    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(4, 3)), rng.normal(size=(3, 5))
    [weight] = TRANSPOSE.to_canonical([kernel])
    want = torch.nn.functional.linear(torch.tensor(x), torch.tensor(weight)).numpy()
    np.testing.assert_allclose(x @ kernel, want, atol=1e-12)

    x, kernel = rng.normal(size=(2, 8, 6, 3)), rng.normal(size=(4, 2, 3, 5))
    [weight] = HWIO.to_canonical([kernel])
    with jax.enable_x64(True):
        ours = jax.lax.conv_general_dilated(
            x, kernel, (4, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    want = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(weight.copy()), stride=(4, 2)
    )
    np.testing.assert_allclose(np.asarray(ours).transpose(0, 3, 1, 2), want.numpy(), atol=1e-12)


# -- tables


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["hub", "flax", "flax-safetensors", "timm"])
def test_tables_hold_every_parameter_and_are_invertible(name, head):
    config = make_config(num_hidden_layers=12, qkv_bias=True)
    weights = random_weights(config, head)
    if name == "timm":  # it has no mask token or decoder
        weights = {n: w for n, w in weights.items() if "decoder" not in n and "mask_token" not in n}
    table = table_for(name, config)
    foreign = to_foreign(in_memory(weights), table)
    assert not foreign.unused
    arrays = read(foreign)
    assert sum(a.size for a in arrays.values()) == sum(w.size for w in weights.values())
    hints = {"suffix": ".safetensors"}
    assert detect_format(arrays, hints=hints).name == name
    back = to_canonical(in_memory(arrays), table)
    assert not back.unused
    assert {n.removeprefix("vit.") for n in weights} == set(back.tensors)
    for n, w in weights.items():
        np.testing.assert_array_equal(back.tensors[n.removeprefix("vit.")].read(), w)


def test_fused_arrays_are_read_once():
    class Counting(InMemory):
        reads = 0

        def read(self):
            Counting.reads += 1
            return super().read()

    source = {"blocks.0.attn.qkv.weight": Counting(np.arange(18.0).reshape(6, 3))}
    mapped = to_canonical(source, TIMM)
    parts = [tensor.read() for tensor in mapped.tensors.values()]
    assert Counting.reads == 1
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(18.0).reshape(6, 3))


# -- accounting


PAIR = Format(
    "pair",
    rules=(
        Rule(("a.{i}", "b.{i}"), "c.{i}", KEEP),
        Rule("d", "e", TRANSPOSE),
        Rule("f.{i}", "g.{i}"),
    ),
    prefixed=True,
)


def test_what_no_rule_takes_is_named_as_the_file_has_it():
    mapped = to_canonical(in_memory({"vit.f.0": np.ones(2), "z": np.ones(2)}), PAIR)
    assert list(mapped.tensors) == ["g.0"]
    assert mapped.unused == ["z"]


def test_every_fault_is_in_one_error():
    source = in_memory({"a.3": np.ones(2), "d": np.ones((2, 2, 2)), "f.1": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"'a\.3' is there but b\.3 is not.*'d' must have 2"):
        to_canonical(source, PAIR)


@pytest.mark.parametrize("index", ["01", "-1", "x", "", "100000"])
def test_only_numbers_are_block_indices(index):
    assert to_canonical(in_memory({f"f.{index}": np.ones(1)}), PAIR).unused == [f"f.{index}"]


def test_a_fused_array_that_cannot_be_split():
    source = in_memory({"blocks.0.attn.qkv.bias": np.ones(7)})
    with pytest.raises(CheckpointError, match=r"qkv\.bias.*multiple of 3"):
        to_canonical(source, TIMM)


def test_half_a_fused_array_is_named_for_every_block():
    names = [
        f"encoder.layer.{i}.attention.attention.{part}.{leaf}"
        for i, part, leaf in itertools.product(
            (0, 1), ("query", "key", "value"), ("weight", "bias")
        )
    ]
    gone = {names[0], names[9]}
    source = in_memory({name: np.ones((2, 2)) for name in names if name not in gone})
    with pytest.raises(CheckpointError) as error:
        to_foreign(source, TIMM)
    assert str(error.value).count("is there but") == 2
    for name in gone:
        assert f"{name} is not" in str(error.value)


def test_two_keys_for_one_parameter():
    source = in_memory(
        {"vit.f.0": np.ones(1), "f.0": np.ones(1), "f.1": np.ones(1), "vit.f.1": np.ones(1)}
    )
    with pytest.raises(CheckpointError, match=r"'vit\.f\.0' and 'f\.0'; 'f\.1' and 'vit\.f\.1'"):
        to_canonical(source, PAIR)
    # Two rules that fill one target.
    twice = Format("twice", rules=(Rule("a", "c"), Rule("b", "c")))
    with pytest.raises(CheckpointError, match=r"c is filled twice, the second time by 'b'"):
        to_canonical(in_memory({"a": np.ones(1), "b": np.ones(1)}), twice)


def test_fused_parts_of_different_dtypes():
    names = [f"encoder.layer.0.attention.attention.{n}.bias" for n in ("query", "key", "value")]
    arrays = dict(zip(names, (np.ones(2), np.ones(2, np.float32), np.ones(2)), strict=True))
    with pytest.raises(CheckpointError, match="must have one dtype"):
        to_foreign(in_memory(arrays), TIMM)


def test_a_config_that_timm_networks_do_not_have_is_named(tmp_path):
    from safetensors.numpy import save_file

    from vit_torch import ViTForImageClassification

    config = make_config()
    weights = random_weights(config, "classifier")
    arrays = read(to_foreign(in_memory(weights), TIMM))
    save_file(
        {name: np.ascontiguousarray(a) for name, a in arrays.items()}, tmp_path / "timm.safetensors"
    )
    with pytest.warns(
        UserWarning, match=r"layer_norm_eps=1e-06.*the config says layer_norm_eps=1e-12"
    ):
        ViTForImageClassification.from_pretrained(tmp_path / "timm.safetensors", config=config)


# -- detection


def test_no_format_fits():
    keys = ["bert.encoder.layer.0.attention.self.query.weight", "cls.predictions.bias"]
    with pytest.raises(CheckpointError, match=r"not the weights of a Vision Transformer.*bert"):
        detect_format(keys)


def test_two_formats_fit_equally_well():
    config = make_config(num_hidden_layers=2)
    weights = random_weights(config)
    other = read(to_foreign(in_memory(weights), HUB_V5))
    mixed = {n: w for n, w in weights.items() if not n.startswith("encoder.layer.1.")}
    mixed |= {n: w for n, w in other.items() if n.startswith("layers.1.")}
    with pytest.raises(CheckpointError, match=r"fit hub \(.*v4\) and hub \(.*v5\).* equally well"):
        detect_format(mixed)


def test_formats_that_say_the_same_are_no_question():
    """A network without blocks has the same names in v4 and v5."""
    assert detect_format(parameter_shapes(make_config("no layers"))).name == "hub"


def test_few_known_keys_among_many():
    keys = ["embeddings.patch_embeddings.projection.weight", *(f"other.{i}" for i in range(9))]
    with pytest.raises(CheckpointError, match="not the weights of a Vision Transformer"):
        detect_format(keys)


def test_nothing_to_tell_from():
    with pytest.raises(CheckpointError, match="no keys"):
        detect_format([])


# -- sizes against published figures


# Parameters with 1000 classes, as google-research/vision_transformer (vit_jax) counts them for
# ViT-Ti/16, S/16, B/16, L/16 and H/14.
PUBLISHED = {
    "tiny": 5_717_416,
    "small": 22_050_664,
    "base": 86_567_656,
    "large": 304_326_632,
    "huge": 632_045_800,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    shapes = parameter_shapes(preset(name, num_labels=1000), "classifier")
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PUBLISHED[name]
    assert set(PUBLISHED) <= set(PRESETS)


# -- a real network


@pytest.mark.slow
@pytest.mark.skipif(not DEIT_TINY.is_dir(), reason="the shared DeiT-Tiny is not beside this clone")
def test_a_real_network_in_timm_layout_names_the_photos():
    """ImageNet classes as scikit-image's photos show them; both twins from one timm file."""
    from skimage import data

    from vit_flax import FlaxViTForImageClassification
    from vit_torch import ViTForImageClassification
    from vit_torch.parity import compare

    config = preset("tiny", num_labels=1000, **TIMM.settings)
    model, twin = (
        cls.from_pretrained(DEIT_TINY / "model.safetensors", config=config)
        for cls in (FlaxViTForImageClassification, ViTForImageClassification)
    )
    x = np.stack([imagenet_pixels(photo()) for photo in (data.chelsea, data.coffee)])
    logits = np.asarray(model(x).logits)
    assert logits.argmax(-1).tolist() == [285, 967]  # Egyptian cat, espresso
    # This network lets roundings grow: after block 9, torch's own float32 is 4.0e-4 from float64
    # (activations to 20) and Flax's 2.0e-4. So the bound is held against the twin in float64.
    for stage in compare(model, twin.double(), x).stages:
        assert stage.max_abs <= BOUNDS["twins float32"] * max(stage.scale, 1.0), stage


def imagenet_pixels(photo: np.ndarray) -> np.ndarray:
    """timm's evaluation: shorter side to 248 bicubic, centre 224, ImageNet mean and std."""
    image = Image.fromarray(photo)
    scale = 248 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return pixels.transpose(2, 0, 1).astype(np.float32)
