"""SigLIP and SigLIP 2: both towers, alone and together, in both twins.

References are Transformers 4.57.6's models with every parameter drawn at random; weights reach ours
through the references' own files, so names and layouts are compared too. Files of Transformers 5
are written by the names its models have.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec
from networks import flax_twin, random_weights, randomize, torch_twin
from safetensors.numpy import load_file, save_file

import vit_flax
import vit_torch
from vit_common.config import AutoConfig
from vit_common.errors import ConfigError, InputError
from vit_common.families import SiglipVisionConfig
from vit_common.parameters import parameter_shapes
from vit_common.presets import preset
from vit_flax.sharding import partition_spec

VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 10,
    "projection_size": 24,
    "eos_token_id": 49,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
KINDS = ("VisionModel", "ForImageClassification", "TextModel", "Model")
NAMES = [f"{stem}{kind}" for stem in ("Siglip", "Siglip2") for kind in KINDS]
IDS = np.array([[1, 5, 6, 49, 0], [1, 9, 49, 0, 0]])
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


def whole(stem: str, **vision: Any) -> Any:
    size = {"image_size": 16} if stem == "Siglip" else {"num_patches": 16}
    return getattr(transformers, f"{stem}Config")(
        vision_config={**VISION, **size, **vision}, text_config=TEXT, num_labels=5
    )


def stem_of(name: str) -> str:
    return "Siglip2" if name.startswith("Siglip2") else "Siglip"


def reference(name: str, **vision: Any) -> Any:
    config = whole(stem_of(name), **vision)
    if "Vision" in name:
        config = config.vision_config
    elif "Text" in name:
        config = config.text_config
    return randomize(getattr(transformers, name)(config))


def patches(pixels: np.ndarray, side: int = 4) -> np.ndarray:
    """Flattened patches (B, N, P P C), by the peer's own function."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    return np.stack([convert_image_to_patches(p.transpose(1, 2, 0), side) for p in pixels])


def inputs(name: str) -> dict[str, np.ndarray]:
    given: dict[str, np.ndarray] = {}
    if "Vision" not in name and "Classification" not in name:
        given["input_ids"] = IDS
    if "Text" not in name:
        given["pixel_values"] = PIXELS
        if stem_of(name) == "Siglip2":
            given["pixel_values"] = patches(PIXELS)
            given["pixel_attention_mask"] = np.ones((2, 16), np.int64)
            given["spatial_shapes"] = np.array([[4, 4], [4, 4]])
    return given


def tensors(given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in given.items()}


def array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def check(output: Any, wanted: Any) -> None:
    assert list(output.keys()) == list(wanted.keys())
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):
            np.testing.assert_allclose(array(output[key]), array(value), atol=2e-5, rtol=2e-5)


def same(one: Any, other: Any) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_torch_twin_is_transformers_and_so_are_its_files(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    given = tensors(inputs(name))
    model = getattr(vit_torch, name).from_pretrained(tmp_path)
    check(model(**given), theirs(**given))
    auto = "AutoModel" + ("ForImageClassification" if "Classification" in name else "")
    assert type(getattr(vit_torch, auto).from_pretrained(tmp_path)) is type(model)
    again = type(model)(type(model).config_class(**theirs.config.to_dict()))
    again.load_state_dict(theirs.state_dict())
    same(model, again)
    model.save_pretrained(tmp_path / "ours")
    same(getattr(transformers, name).from_pretrained(tmp_path / "ours"), theirs)
    assert model.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "SiglipVisionModel" else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_the_flax_twin_is_transformers_and_so_are_its_files(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    given = inputs(name)
    model = getattr(vit_flax, f"Flax{name}").from_pretrained(tmp_path)
    check(model(**given), theirs(**tensors(given)))
    model.save_pretrained(tmp_path / "hub")
    same(getattr(transformers, name).from_pretrained(tmp_path / "hub"), theirs)
    model.save_pretrained(tmp_path / "flax", to="flax")
    twin = getattr(vit_torch, name)
    same(twin.from_pretrained(tmp_path / "flax"), twin.from_pretrained(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["Siglip", "Siglip2"])
def test_twins_in_float64(stem):
    table = whole(stem).to_dict()
    for name, head in (("VisionModel", None), ("ForImageClassification", "classifier")):
        twin = getattr(vit_torch, f"{stem}{name}")
        config = twin.config_class.from_dict(table)
        weights = random_weights(config, head)
        ours = torch_twin(twin, config, weights, torch.float64)
        pixels = PIXELS.astype(np.float64)
        wanted = ours(torch.tensor(pixels))
        with jax.enable_x64(True):
            flax = flax_twin(getattr(vit_flax, f"Flax{stem}{name}"), config, weights, jnp.float64)
            output = flax(pixels)
        for key, value in wanted.items():
            np.testing.assert_allclose(output[key], array(value), atol=1e-11, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["Siglip", "Siglip2"])
def test_scans_kernels_of_8_bits_and_sharding(stem, tmp_path):
    name = f"{stem}ForImageClassification"
    reference(name).save_pretrained(tmp_path)
    cls = getattr(vit_flax, f"Flax{name}")
    wanted = cls.from_pretrained(tmp_path)(PIXELS).logits
    scanned = cls.from_pretrained(tmp_path, scan_layers=True)
    np.testing.assert_allclose(scanned(PIXELS).logits, wanted, atol=1e-5)
    rough = cls.from_pretrained(tmp_path, weights="int8")(PIXELS).logits
    assert 0 < np.abs(rough - wanted).max() < 0.1 * np.abs(wanted).max()
    config = getattr(vit_flax, f"{stem}Config").from_dict(whole(stem).to_dict())
    both = getattr(vit_flax, f"Flax{stem}Model")(config, _do_init=False)
    axes = ("data", "fsdp", "model")
    specs = {path: partition_spec(path, axes) for path in both._single_shapes}
    assert specs["text_model", "head", "kernel"] == PartitionSpec("fsdp")


V5 = {"VisionModel": "vision_model.", "TextModel": "text_model."}


@pytest.mark.parametrize("stem", ["Siglip", "Siglip2"])
@pytest.mark.parametrize("kind", V5)
def test_towers_in_files_of_transformers_5(stem, kind, tmp_path):
    """Transformers 5.23.0 writes a tower by itself without its prefix."""
    theirs = reference(f"{stem}{kind}")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith(V5[kind]) for name in weights)
    weights = {name.removeprefix(V5[kind]): value for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    given = tensors(inputs(f"{stem}{kind}"))
    check(getattr(vit_torch, f"{stem}{kind}").from_pretrained(tmp_path)(**given), theirs(**given))


@pytest.mark.parametrize("stem", ["Siglip", "Siglip2"])
def test_a_tower_is_taken_out_of_a_whole_model(stem, tmp_path):
    theirs = reference(f"{stem}Model")
    theirs.save_pretrained(tmp_path)
    given = tensors(inputs(f"{stem}VisionModel"))
    with pytest.warns(UserWarning, match="not used: .*text_model"):
        tower = getattr(vit_torch, f"{stem}VisionModel").from_pretrained(tmp_path)
    wanted = theirs.get_image_features(**given)
    np.testing.assert_allclose(array(tower(**given).pooler_output), array(wanted), atol=2e-5)
    with pytest.warns(UserWarning, match="not used: "):
        text = getattr(vit_torch, f"{stem}TextModel").from_pretrained(tmp_path)
    wanted = theirs.get_text_features(torch.tensor(IDS))
    np.testing.assert_allclose(array(text(torch.tensor(IDS)).pooler_output), array(wanted))


@pytest.mark.parametrize("stem", ["Siglip", "Siglip2"])
def test_losses_and_masks_are_those_of_transformers(stem, tmp_path):
    theirs = reference(f"{stem}Model")
    theirs.save_pretrained(tmp_path)
    given = tensors(inputs(f"{stem}Model"))
    mask = torch.tensor((IDS != 0).astype(np.int64))
    wanted = theirs(**given, attention_mask=mask, return_loss=True)
    ours = getattr(vit_torch, f"{stem}Model").from_pretrained(tmp_path)
    check(ours(**given, attention_mask=mask, return_loss=True), wanted)
    with pytest.raises(InputError, match="one text for each image"):
        ours(**{**given, "input_ids": given["input_ids"][:1]}, return_loss=True)


@pytest.mark.slow
def test_flax_losses_and_masks_are_those_of_transformers(tmp_path):
    theirs = reference("SiglipModel")
    theirs.save_pretrained(tmp_path)
    given, mask = inputs("SiglipModel"), (IDS != 0).astype(np.int64)
    wanted = theirs(**tensors(given), attention_mask=torch.tensor(mask), return_loss=True)
    ours = vit_flax.FlaxSiglipModel.from_pretrained(tmp_path)
    check(ours(**given, attention_mask=mask, return_loss=True), wanted)


SIZES = ((24, 24), (8, 32))


def test_other_sizes_are_resampled_as_in_transformers(tmp_path):
    theirs = reference("SiglipVisionModel")
    theirs.save_pretrained(tmp_path)
    ours = vit_torch.SiglipVisionModel.from_pretrained(tmp_path)
    for size in SIZES:
        pixels = torch.randn(1, 3, *size)
        wanted = theirs(pixels, interpolate_pos_encoding=True)
        check(ours(pixels, interpolate_pos_encoding=True), wanted)
    larger = vit_torch.SiglipVisionModel.from_pretrained(tmp_path, image_size=24)
    pixels = torch.randn(1, 3, 24, 24)
    check(larger(pixels), theirs(pixels, interpolate_pos_encoding=True))
    assert larger.config.image_size == 24


def test_siglip2_resamples_to_each_batch_and_leaves_padding_out(tmp_path):
    theirs = reference("Siglip2VisionModel")
    theirs.save_pretrained(tmp_path)
    ours = vit_torch.Siglip2VisionModel.from_pretrained(tmp_path)
    for height, width in SIZES:
        pixels = np.random.default_rng(1).normal(size=(2, 3, height, width)).astype(np.float32)
        grid, count = (height // 4, width // 4), height * width // 16
        padded = np.zeros((2, count + 3, 48), np.float32)
        padded[:, :count] = patches(pixels)
        given = {
            "pixel_values": torch.tensor(padded),
            "pixel_attention_mask": torch.tensor([[1] * count + [0] * 3] * 2),
            "spatial_shapes": torch.tensor([grid, grid]),
        }
        wanted = theirs(**given)
        for output in (ours(**given), ours(torch.tensor(pixels))):
            np.testing.assert_allclose(
                array(output.pooler_output), array(wanted.pooler_output), atol=2e-5
            )
            hidden = array(wanted.last_hidden_state)[:, :count]
            np.testing.assert_allclose(array(output.last_hidden_state), hidden, atol=2e-5)
    larger = vit_torch.Siglip2VisionModel.from_pretrained(tmp_path, image_size=24)
    assert larger.config.num_patches == 36
    pixels = torch.randn(1, 3, 24, 24)
    np.testing.assert_allclose(
        array(larger(pixels).pooler_output), array(ours(pixels).pooler_output), atol=2e-5
    )


def test_patches_that_are_not_of_one_size_are_refused():
    model = vit_torch.Siglip2VisionModel(vit_torch.Siglip2VisionConfig(**VISION, num_patches=16))
    flax = vit_flax.FlaxSiglip2VisionModel(
        vit_flax.Siglip2VisionConfig(**VISION, num_patches=16), _do_init=False
    )
    for given, shapes, what in (
        (patches(PIXELS), [[4, 4], [2, 8]], "same for all images"),
        (patches(PIXELS), None, "rows and columns of each image"),
        (patches(PIXELS), [[4, 5], [4, 5]], "at most 16 patches"),
        (patches(PIXELS), [[-2, -3], [-2, -3]], "at least one; given -2 x -3"),
        (patches(PIXELS), [[4.5, 3.5], [4.5, 3.5]], r"integers \(2, 2\); given float"),
        (patches(PIXELS), [[4, 4, 1], [4, 4, 1]], r"given int\d+ of shape \(2, 3\)"),
        (patches(PIXELS), [4, 4], r"given int\d+ of shape \(2,\)"),
        (patches(PIXELS)[:0], [[4, 4]], "at least one image"),
        (patches(PIXELS)[:, :, :40], [[4, 4], [4, 4]], "of 48 numbers"),
    ):
        shape = {} if shapes is None else {"spatial_shapes": torch.tensor(shapes)}
        with pytest.raises(InputError, match=what):
            model(torch.tensor(given), **shape)
        shape = {name: value.numpy() for name, value in shape.items()}
        with pytest.raises(InputError, match=what):
            flax(given, **shape, params={"a": 1})


@pytest.mark.parametrize("stem", ["Siglip", "Siglip2"])
def test_masks_and_positions_of_other_texts_are_refused_in_both_twins(stem):
    theirs = getattr(transformers, f"{stem}TextConfig")(**TEXT)
    torch_model = getattr(vit_torch, f"{stem}TextModel")(
        getattr(vit_torch, f"{stem}TextConfig").from_dict(theirs.to_dict())
    )
    model = getattr(vit_flax, f"Flax{stem}TextModel")(
        getattr(vit_flax, f"{stem}TextConfig").from_dict(theirs.to_dict()), _do_init=False
    )
    for name in ("attention_mask", "position_ids"):
        for shape in ((2, 4), (3, 5), (2, 1), (5,)):
            beside = {name: np.zeros(shape, np.int64)}
            with pytest.raises(InputError, match=f"`{name}` must have the shape of `input_ids`"):
                model(IDS, **beside, params={"a": 1})
            with pytest.raises(InputError, match=f"`{name}` must have the shape of `input_ids`"):
                torch_model(torch.tensor(IDS), **{name: torch.tensor(beside[name])})


@pytest.mark.parametrize("stem", ["CLIP", "Siglip", "Siglip2"])
def test_a_configuration_leaves_those_of_its_towers_as_they_were(stem):
    cls = getattr(vit_flax, f"{stem}Config")
    tower = getattr(vit_flax, f"{stem}VisionConfig")(**VISION)
    before = tower.to_dict()
    assert cls(vision_config=tower, hidden_act="relu").hidden_act == "relu"
    assert tower.to_dict() == before
    with pytest.raises(ConfigError, match="`text_config` was given twice"):
        cls({}, text_config={})
    with pytest.raises(ConfigError, match=f"{stem}Config takes at most"):
        cls(*[None] * 50)


@pytest.mark.parametrize("stem", ["CLIP", "Siglip", "Siglip2"])
def test_fields_of_the_image_tower_are_keywords_of_a_classifier(stem, tmp_path):
    cls = getattr(vit_torch, f"{stem}ForImageClassification")
    size = {"num_patches": 16} if stem == "Siglip2" else {"image_size": 16}
    vision = VISION | size
    model = cls(cls.config_class(vision_config=vision, text_config={}, num_labels=3))
    model.save_pretrained(tmp_path)
    larger = cls.from_pretrained(tmp_path, image_size=24, hidden_act="relu")
    assert larger.config.grid_size == (6, 6)
    assert larger.config.vision_config.hidden_act == "relu"
    positions = larger.vision_model.embeddings.position_embeddings
    assert positions.shape[1] == 36 + (stem == "CLIP")
    # A file's own key of that name says nothing, as in Transformers.
    if stem == "Siglip2":
        table = json.loads((tmp_path / "config.json").read_text())
        table["vision_config"]["image_size"] = 999
        (tmp_path / "config.json").write_text(json.dumps(table))
        assert cls.from_pretrained(tmp_path).config.grid_size == (4, 4)


def test_without_attention_pooling(tmp_path):
    theirs = reference("SiglipVisionModel", vision_use_head=False)
    theirs.save_pretrained(tmp_path)
    ours = vit_torch.SiglipVisionModel.from_pretrained(tmp_path)
    given = tensors(inputs("SiglipVisionModel"))
    output, wanted = ours(**given), theirs(**given)
    assert output.pooler_output is None
    assert wanted.pooler_output is None
    np.testing.assert_allclose(
        array(output.last_hidden_state), array(wanted.last_hidden_state), atol=2e-5
    )
    ours.save_pretrained(tmp_path / "ours")
    same(transformers.SiglipVisionModel.from_pretrained(tmp_path / "ours"), theirs)


def test_configurations_are_those_of_transformers():
    for stem in ("Siglip", "Siglip2"):
        theirs = whole(stem)
        ours = AutoConfig.from_dict(theirs.to_dict())
        assert type(ours) is getattr(vit_flax, f"{stem}Config")
        assert (ours.hidden_size, ours.num_labels, ours.text_config.vocab_size) == (24, 5, 50)
        back = getattr(transformers, f"{stem}Config").from_dict(json.loads(ours.to_json_string()))
        for name in ("vision_config", "text_config"):
            for key, value in (VISION if name == "vision_config" else TEXT).items():
                assert getattr(getattr(back, name), key) == value
        for part in ("Vision", "Text"):
            name = f"{stem}{part}Config"
            defaults = getattr(transformers, name)().to_dict()
            own = getattr(vit_flax, name)().to_dict()
            for key in getattr(vit_flax, name).fields:
                if key in defaults and key in own:
                    assert own[key] == defaults[key], key
    with pytest.raises(ConfigError, match="as many patches down as across"):
        vit_flax.Siglip2VisionConfig(**VISION).image_size = (16, 32)
    with pytest.raises(ConfigError, match="multiple of `patch_size`, 4; given 18"):
        vit_flax.Siglip2VisionConfig(**VISION, image_size=18)
    with pytest.raises(ConfigError, match="square of an integer"):
        vit_flax.Siglip2VisionConfig(num_patches=15)


def big_vision_file(path, weights: dict[str, np.ndarray], heads: int) -> None:
    """The image tower as big_vision's `two_towers` writes it, a text tower beside it: names and
    layouts of `models/vit.py` and `models/proj/image_text/two_towers.py`."""
    D = weights["embeddings.position_embeddings"].shape[-1]
    block = "Transformer/encoderblock_{i}"
    names = {
        "embeddings.patch_embeddings.projection": "embedding",
        "layernorm": "Transformer/encoder_norm",
        "pooler.layernorm": "MAPHead_0/LayerNorm_0",
        "pooler.intermediate.dense": "MAPHead_0/MlpBlock_0/Dense_0",
        "pooler.output.dense": "MAPHead_0/MlpBlock_0/Dense_1",
        "pooler.attention.output.dense": "MAPHead_0/MultiHeadDotProductAttention_0/out",
        **{
            f"pooler.attention.{n}": f"MAPHead_0/MultiHeadDotProductAttention_0/{n}"
            for n in ("query", "key", "value")
        },
    }
    for i in range(2):
        ours, theirs = f"encoder.layer.{i}", block.format(i=i)
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        names |= {f"{ours}.attention.attention.{n}": f"{attention}/{n}" for n in
                  ("query", "key", "value")}  # fmt: skip
        names |= {
            f"{ours}.attention.output.dense": f"{attention}/out",
            f"{ours}.intermediate.dense": f"{theirs}/MlpBlock_0/Dense_0",
            f"{ours}.output.dense": f"{theirs}/MlpBlock_0/Dense_1",
            f"{ours}.layernorm_before": f"{theirs}/LayerNorm_0",
            f"{ours}.layernorm_after": f"{theirs}/LayerNorm_1",
        }
    file = {
        "pos_embedding": weights["embeddings.position_embeddings"],
        "MAPHead_0/probe": weights["pooler.probe"],
    }
    for ours, theirs in names.items():
        weight, bias = weights[f"{ours}.weight"], weights[f"{ours}.bias"]
        leaf = "scale" if weight.ndim == 1 else "kernel"
        if theirs.endswith(("query", "key", "value")):
            weight, bias = weight.T.reshape(D, heads, -1), bias.reshape(heads, -1)
        elif theirs.endswith("out"):
            weight = weight.T.reshape(heads, -1, D)
        else:
            weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        file |= {f"{theirs}/{leaf}": weight, f"{theirs}/bias": bias}
    text = {
        "txt/Embed_0/embedding": np.ones((50, D)),
        "txt/pos_embedding": np.ones((1, 10, D)),
        "txt/Encoder_0/encoder_norm/scale": np.ones(D),
        "txt/head/kernel": np.ones((D, D)),
        "t": np.ones(1),
        "b": np.ones(1),
    }
    table = {f"img/{name}": value for name, value in file.items()} | text
    np.savez(path, **{f"params/{n}": np.asarray(v, np.float32) for n, v in table.items()})


def test_big_vision_files_of_two_towers(tmp_path):
    theirs = reference("SiglipVisionModel")
    theirs.save_pretrained(tmp_path)
    ours = vit_torch.SiglipVisionModel.from_pretrained(tmp_path)
    state = {
        name.removeprefix("vision_model."): value.numpy()
        for name, value in ours.state_dict().items()
    }
    big_vision_file(tmp_path / "siglip.npz", state, 3)
    model = vit_torch.SiglipVisionModel.from_pretrained(tmp_path / "siglip.npz")
    same(model, ours)
    assert type(model.config) is SiglipVisionConfig
    assert model.config.image_size == 16
    given = tensors(inputs("SiglipVisionModel"))
    check(model(**given), theirs(**given))
    model.save_pretrained(tmp_path / "hub")
    same(transformers.SiglipVisionModel.from_pretrained(tmp_path / "hub"), theirs)
    from vit_convert import convert

    left = convert(tmp_path / "siglip.npz", tmp_path / "vit").ignored
    assert any("txt" in name and "text tower" in why for name, why in left.items())


def test_a_vit_of_another_network_is_no_siglip(tmp_path):
    config = vit_flax.ViTConfig(**VISION, image_size=16, pooling="map", use_cls_token=False)
    assert SiglipVisionConfig.from_related(config).num_patches == 16
    for change in (
        {"pooling": "mean"},
        {"pooling": "map", "pooler_num_heads": 4},
        {"pooling": "map", "use_qk_norm": True},
        {"pooling": "map", "qkv_bias": False},
    ):
        config = vit_flax.ViTConfig(**VISION, image_size=16, use_cls_token=False, **change)
        assert SiglipVisionConfig.from_related(config) is None


@pytest.mark.parametrize(
    ("name", "image_size", "millions"),
    [
        ("siglip-base", 224, 92.88),
        ("siglip-base", 384, 93.18),
        ("siglip-large", 256, 315.96),
        ("siglip-so400m", 224, 427.68),
        ("siglip-so400m", 378, 428.23),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, image_size, millions):
    """`image_mparams` of `docs/model_profile.csv` of mlfoundations/open_clip."""
    shapes = parameter_shapes(preset(name, image_size=image_size))
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_whole_models_have_the_published_numbers_of_parameters():
    config = vit_flax.SiglipConfig()
    count = vit_flax.FlaxSiglipModel(config, _do_init=False).num_parameters()
    assert count / 1e6 == pytest.approx(203.16, abs=0.005)  # google/siglip-base-patch16-224
    model = vit_flax.FlaxSiglipForImageClassification(
        preset("siglip-base", num_labels=10), _do_init=False
    )
    assert model.num_parameters() == 92_884_224 + 7_690


def test_pixels_are_those_of_transformers(tmp_path):
    rng = np.random.default_rng(0)
    theirs = transformers.SiglipImageProcessor()
    images = [
        PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        for size in ((40, 61), (300, 90), (224, 224))
    ]
    images.append(images[0].convert("RGBA"))
    options = {"do_convert_rgb": True, "return_tensors": "np"}
    wanted = theirs(images, **options).pixel_values
    for cls in (vit_flax.SiglipImageProcessor, vit_torch.SiglipImageProcessorFast):
        np.testing.assert_array_equal(cls()(images, **options).pixel_values, wanted)
    theirs.save_pretrained(tmp_path)
    ours = vit_flax.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(ours) is vit_flax.SiglipImageProcessor
    wanted_options = {k: v for k, v in theirs.to_dict().items() if not k.startswith("_")}
    assert ours.to_dict() == wanted_options
    size = {"size": {"height": 32, "width": 48}, "resample": 2, **options}
    np.testing.assert_array_equal(
        ours(images, **size).pixel_values, theirs(images, **size).pixel_values
    )
