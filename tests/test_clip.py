"""CLIP: both towers, alone, with their projections and together, in both twins.

References are Transformers 4.57.6's PyTorch and Flax models with every parameter drawn at random;
weights reach our models through the references' own files, so names and layouts are compared too.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from networks import randomize
from safetensors.numpy import load_file

import vit_flax
import vit_torch
from vit_common.config import AutoConfig
from vit_common.errors import CheckpointError, ConfigError, InputError

VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 20,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 10,
    "projection_dim": 20,
    "eos_token_id": 49,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
INPUTS = {
    "CLIPModel": ("input_ids", "pixel_values"),
    "CLIPVisionModel": ("pixel_values",),
    "CLIPVisionModelWithProjection": ("pixel_values",),
    "CLIPTextModel": ("input_ids",),
    "CLIPTextModelWithProjection": ("input_ids",),
    "CLIPForImageClassification": ("pixel_values",),
}
IDS = np.array([[1, 5, 6, 49, 0], [1, 9, 49, 0, 0]])
NAMES = [
    pytest.param(name, marks=[] if name == "CLIPVisionModel" else pytest.mark.slow)
    for name in INPUTS
]


def whole(**text: Any) -> Any:
    return transformers.CLIPConfig(
        vision_config=VISION, text_config={**TEXT, **text}, projection_dim=20, num_labels=5
    )


def reference(name: str, **text: Any) -> Any:
    config = whole(**text)
    if "Vision" in name:
        config = config.vision_config
    elif "Text" in name:
        config = config.text_config
    return randomize(getattr(transformers, name)(config))


def inputs(name: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a call, for Flax and for PyTorch."""
    pixels = np.random.default_rng(seed).normal(size=(2, 3, 16, 16)).astype(np.float32)
    arrays = {"input_ids": IDS, "pixel_values": pixels}
    given = {key: arrays[key] for key in INPUTS[name]}
    return given, {key: torch.tensor(value) for key, value in given.items()}


def array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    given, tensors = inputs(name)
    with torch.no_grad():
        wanted = theirs(**tensors)
    twins = (
        getattr(vit_flax, f"Flax{name}").from_pretrained(tmp_path)(**given),
        getattr(vit_torch, name).from_pretrained(tmp_path)(**tensors),
    )
    for output in twins:
        assert list(output.keys()) == list(wanted.keys())
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                np.testing.assert_allclose(array(output[key]), array(value), atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_go_there_and_back(name, tmp_path):
    theirs, twin = reference(name), getattr(vit_torch, name)
    model = twin(twin.config_class(**theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path)
    back = getattr(transformers, name).from_pretrained(tmp_path)
    flax = getattr(vit_flax, f"Flax{name}").from_pretrained(tmp_path)
    flax.save_pretrained(tmp_path / "flax", to="flax")
    again = twin.from_pretrained(tmp_path / "flax")
    for old, new in ((theirs, back), (model, again)):
        states = old.state_dict(), new.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if name in ("CLIPModel", "CLIPTextModel", "CLIPVisionModel"):
        peer = getattr(transformers, f"Flax{name}").from_pretrained(tmp_path / "flax")
        given, _ = inputs(name)
        np.testing.assert_allclose(peer(**given)[0], flax(**given)[0], atol=2e-5)


def test_flax_models_of_transformers_and_ours_share_trees():
    theirs = transformers.FlaxCLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    ours = vit_flax.FlaxCLIPVisionModel(vit_flax.CLIPVisionConfig(**VISION))
    shapes = [
        {path: leaf.shape for path, leaf in flatten_dict(model.params).items()}
        for model in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]
    pixels = inputs("CLIPVisionModel")[0]["pixel_values"]
    wanted = theirs(pixels)
    ours.params = theirs.params
    # The module itself takes Transformers' tree, and the names that all networks here share.
    for params in (theirs.params, ours.params, ours.network_params):
        output = ours.module.apply({"params": params}, pixels.transpose(0, 2, 3, 1))
        np.testing.assert_allclose(output.pooler_output, wanted.pooler_output, atol=2e-5)
        np.testing.assert_allclose(output.last_hidden_state, wanted.last_hidden_state, atol=2e-5)
    drawn = ours.module.init(jax.random.key(0), pixels.transpose(0, 2, 3, 1))["params"]
    assert {path: leaf.shape for path, leaf in flatten_dict(drawn).items()} == shapes[0]


@pytest.mark.parametrize("eos", [49, 2])
def test_the_end_of_a_text_is_found_by_either_rule(eos, tmp_path):
    # 2 is what files of before 2023 say; then the largest id ends a text.
    theirs = reference("CLIPTextModel", eos_token_id=eos)
    theirs.save_pretrained(tmp_path)
    ids = np.array([[1, 3, 49, 2, 5], [1, 48, 2, 49, 7]])
    wanted = theirs(torch.tensor(ids)).pooler_output.detach().numpy()
    ours = vit_torch.CLIPTextModel.from_pretrained(tmp_path)(torch.tensor(ids)).pooler_output
    np.testing.assert_allclose(ours.detach().numpy(), wanted, atol=2e-5)
    ours = vit_flax.FlaxCLIPTextModel.from_pretrained(tmp_path)(ids).pooler_output
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_losses_and_masks_are_those_of_transformers(tmp_path):
    theirs = reference("CLIPModel")
    theirs.save_pretrained(tmp_path)
    given, tensors = inputs("CLIPModel")
    mask = (IDS != 0).astype(np.int64)
    wanted = theirs(**tensors, attention_mask=torch.tensor(mask), return_loss=True)
    ours = vit_torch.CLIPModel.from_pretrained(tmp_path)
    output = ours(**tensors, attention_mask=torch.tensor(mask), return_loss=True)
    np.testing.assert_allclose(output.loss.detach(), wanted.loss.detach(), rtol=1e-5)
    flax = vit_flax.FlaxCLIPModel.from_pretrained(tmp_path)
    output = flax(**given, attention_mask=mask, return_loss=True)
    np.testing.assert_allclose(output.loss, wanted.loss.detach(), rtol=1e-5)


@pytest.mark.slow
def test_other_sizes_are_resampled_as_in_transformers(tmp_path):
    theirs = reference("CLIPVisionModel")
    theirs.save_pretrained(tmp_path)
    ours = vit_torch.CLIPVisionModel.from_pretrained(tmp_path)
    flax = vit_flax.FlaxCLIPVisionModel.from_pretrained(tmp_path)
    for size in ((24, 24), (8, 32)):
        pixels = torch.randn(1, 3, *size)
        wanted = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state.detach()
        output = ours(pixels, interpolate_pos_encoding=True).last_hidden_state.detach()
        np.testing.assert_allclose(output, wanted, atol=2e-5)
        output = flax(pixels.numpy(), interpolate_pos_encoding=True).last_hidden_state
        np.testing.assert_allclose(output, wanted, atol=2e-5)


@pytest.mark.slow
def test_a_tower_is_taken_out_of_a_whole_clip(tmp_path):
    theirs = reference("CLIPModel")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not used: .*text_model"):
        tower = vit_torch.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not used: embeddings"):
        text = vit_flax.FlaxCLIPTextModelWithProjection.from_pretrained(tmp_path)
    features = theirs.get_text_features(torch.tensor(IDS)).detach()
    np.testing.assert_allclose(text(IDS).text_embeds, features, atol=2e-5)
    _, tensors = inputs("CLIPVisionModel")
    wanted = theirs.get_image_features(**tensors).detach()
    np.testing.assert_array_equal(tower(**tensors).image_embeds.detach(), wanted)


class Block(torch.nn.Module):
    """A block as `clip/model.py` of github.com/openai/CLIP has it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, 4 * width), "c_proj": torch.nn.Linear(4 * width, width)}
        )

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class Blocks(torch.nn.Module):
    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.resblocks = torch.nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        D = 64
        self.conv1 = torch.nn.Conv2d(3, D, 4, 4, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(D))
        self.positional_embedding = torch.nn.Parameter(torch.randn(17, D))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(D), torch.nn.LayerNorm(D)
        self.transformer = Blocks(D, 1, 2)
        self.proj = torch.nn.Parameter(torch.randn(D, 12))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding).permute(1, 0, 2)
        x = self.transformer(x).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(torch.nn.Module):
    def __init__(self):
        super().__init__()
        D = 64
        self.visual = Visual()
        self.transformer = Blocks(D, 1, 2)
        self.token_embedding = torch.nn.Embedding(50, D)
        self.positional_embedding = torch.nn.Parameter(torch.randn(10, D))
        self.ln_final = torch.nn.LayerNorm(D)
        self.text_projection = torch.nn.Parameter(torch.randn(D, 12))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.3))

    def texts(self, ids):
        x = (self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]).permute(1, 0, 2)
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask).permute(1, 0, 2))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def authors_file(path, **more: Any) -> Any:
    """A network of OpenAI's code, all of it random, and its file."""
    torch.manual_seed(0)
    theirs = randomize(Clip())
    torch.save({**theirs.state_dict(), **more}, path)
    return theirs


OPENAI = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}


def test_files_of_openai_and_open_clip(tmp_path):
    theirs = authors_file(tmp_path / "clip.pt", **OPENAI)
    pixels = torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match="not used: .*text_model"):
        tower = vit_torch.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip.pt")
    assert (tower.config.num_attention_heads, tower.config.hidden_act) == (1, "quick_gelu")
    wanted = theirs.visual(pixels).detach()
    np.testing.assert_allclose(tower(pixels).image_embeds.detach(), wanted, atol=2e-5)
    config = vit_torch.CLIPConfig(
        vision_config=tower.config.to_dict(),
        text_config={
            **{key: TEXT[key] for key in ("vocab_size", "max_position_embeddings", "eos_token_id")},
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
        },
        projection_dim=12,
    )
    both = vit_torch.CLIPModel.from_pretrained(tmp_path / "clip.pt", config=config)
    ids = torch.tensor(IDS)
    wanted = theirs.texts(ids).detach()
    np.testing.assert_allclose(both.get_text_features(ids).detach(), wanted, atol=2e-5)
    # Of open_clip's files nothing says which activation the network was trained with.
    authors_file(tmp_path / "open.pt")
    with pytest.raises(CheckpointError, match="`hidden_act` is not in these weights"):
        vit_torch.CLIPVisionModel.from_pretrained(tmp_path / "open.pt", num_attention_heads=1)


@pytest.mark.slow
def test_open_clip_is_written(tmp_path):
    from vit_convert import convert

    reference("CLIPModel").save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "open", to="open_clip")
    convert(tmp_path / "open", tmp_path / "back", to="hub")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "back"))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[key], new[key]) for key in old)


def test_configurations_are_those_of_transformers():
    theirs = whole()
    ours = AutoConfig.from_dict(theirs.to_dict())
    assert type(ours) is vit_flax.CLIPConfig
    assert (ours.hidden_size, ours.num_labels, ours.text_config.vocab_size) == (24, 5, 50)
    back = transformers.CLIPConfig.from_dict(json.loads(ours.to_json_string()))
    for name in ("vision_config", "text_config"):
        for key, value in (VISION if name == "vision_config" else TEXT).items():
            assert getattr(getattr(back, name), key) == value
    # Older files say a tower twice; the second one wins.
    older = {"vision_config": {"patch_size": 8}, "vision_config_dict": {"patch_size": 16}}
    assert (
        vit_flax.CLIPConfig(**older).patch_size
        == transformers.CLIPConfig(**older).vision_config.patch_size
    )
    with pytest.raises(ConfigError, match="`vision_config` must be a"):
        vit_flax.CLIPConfig(vision_config=3)


def test_texts_that_do_not_fit_are_refused():
    model = vit_flax.FlaxCLIPTextModel(vit_flax.CLIPTextConfig(**TEXT), _do_init=False)
    twin = vit_torch.CLIPTextModel(vit_torch.CLIPTextConfig(**TEXT))
    for ids, what in (
        (np.ones((1, 11), int), "at most 10 tokens"),
        (np.array([[50]]), "ids from 0 to 49"),
        (np.array([1]), r"\(batch, tokens\)"),
    ):
        with pytest.raises(InputError, match=what):
            model(ids, params={"a": 1})
        with pytest.raises(InputError, match=what):
            twin(torch.tensor(ids))


def test_pixels_are_those_of_transformers():
    rng = np.random.default_rng(0)
    for size in ((40, 61), (300, 90)):
        image = PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        wanted = transformers.CLIPImageProcessor()(image, return_tensors="np").pixel_values
        for cls in (vit_flax.CLIPImageProcessor, vit_flax.CLIPFeatureExtractor):
            ours = cls()(image, return_tensors="np").pixel_values
            np.testing.assert_array_equal(ours, wanted)
    made = vit_flax.CLIPImageProcessor().to_dict()
    assert made["image_processor_type"] == "CLIPImageProcessor"


def test_published_sizes_have_their_number_of_parameters():
    # Counted from the published configuration of openai/clip-vit-base-patch32.
    model = vit_flax.FlaxCLIPModel(vit_flax.CLIPConfig(), _do_init=False)
    assert model.num_parameters() == 151_277_313
    vision = vit_flax.FlaxCLIPVisionModel(vit_flax.CLIPVisionConfig(), _do_init=False)
    assert vision.num_parameters() == 87_456_000
