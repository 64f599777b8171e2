"""DINOv3's authors' files, against their forward pass as paper and public code state it, and names
of newer files of the Hub. (Transformers' model is the reference in `test_families.py`.)"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import vit_flax
import vit_torch
from vit_common.errors import CheckpointError, ConfigError, InputError
from vit_common.families import DINOv3ViTConfig
from vit_common.parameters import parameter_shapes
from vit_common.presets import preset
from vit_convert.convert import convert

WIDTH, HEADS, INNER, REGISTERS, PATCH = 24, 3, 32, 2, 4


class Dense(nn.Linear):
    """A layer whose bias is masked over the key."""

    def __init__(self, bias: bool):
        super().__init__(WIDTH, 3 * WIDTH, bias=bias)
        if bias:
            mask = torch.ones(3 * WIDTH)
            mask[WIDTH : 2 * WIDTH] = 0
            self.register_buffer("bias_mask", mask)

    def forward(self, x):
        return F.linear(x, self.weight, None if self.bias is None else self.bias * self.bias_mask)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))


class Authors(nn.Module):
    """The network by the names of facebookresearch/dinov3; one block."""

    def __init__(self, gated: bool, bias: bool):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.storage_tokens = nn.Parameter(torch.zeros(1, REGISTERS, WIDTH))
        self.mask_token = nn.Parameter(torch.zeros(1, WIDTH))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.rope_embed = nn.Module()
        periods = 100.0 ** (2 * torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 2))
        self.rope_embed.register_buffer("periods", periods)
        block = nn.Module()
        block.norm1, block.norm2 = nn.LayerNorm(WIDTH, eps=1e-5), nn.LayerNorm(WIDTH, eps=1e-5)
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.attn.qkv, block.attn.proj = Dense(bias), nn.Linear(WIDTH, WIDTH)
        block.ls1, block.ls2 = Scale(), Scale()
        if gated:
            block.mlp.w1, block.mlp.w2 = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
            block.mlp.w3 = nn.Linear(INNER, WIDTH)
        else:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.blocks = nn.ModuleList([block])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5)

    def rotate(self, x, rows, columns):
        """(B, A, S, D/A): patches at centres from -1 to 1, channels half a head apart in pairs."""
        places = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, columns)]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).reshape(-1, 2)
        angles = (2 * math.pi * grid[:, :, None] / self.rope_embed.periods).flatten(1).tile(2)
        front, patches = x[:, :, : 1 + REGISTERS], x[:, :, 1 + REGISTERS :]
        a, b = patches.chunk(2, -1)
        patches = patches * angles.cos() + torch.cat([-b, a], -1) * angles.sin()
        return torch.cat([front, patches], 2)

    def forward(self, images):
        x = self.patch_embed.proj(images)
        rows, columns = x.shape[2:]
        B, x = len(x), x.flatten(2).transpose(1, 2)
        front = (token.expand(B, -1, -1) for token in (self.cls_token, self.storage_tokens))
        x = torch.cat([*front, x], 1)
        for block in self.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(B, -1, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = self.rotate(q, rows, columns), self.rotate(k, rows, columns)
            context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(context) * block.ls1.gamma
            mlp, y = block.mlp, block.norm2(x)
            if hasattr(mlp, "w1"):
                y = mlp.w3(F.silu(mlp.w1(y)) * mlp.w2(y))
            else:
                y = mlp.fc2(F.gelu(mlp.fc1(y)))
            x = x + y * block.ls2.gamma
        return self.norm(x)


def make(gated: bool = False, bias: bool = True) -> Authors:
    torch.manual_seed(0)
    model = Authors(gated, bias).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near_one = "norm" in name and name.endswith("weight")
            scale = 0.3 if parameter.ndim == 1 else math.prod(parameter.shape[1:]) ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + near_one)
    return model


@pytest.mark.parametrize(
    ("gated", "bias"),
    [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
)
def test_the_authors_files_there_and_back(gated, bias, tmp_path):
    """On an image that is not square; what lies under the mask is not the key's bias."""
    model = make(gated, bias)
    file = tmp_path / "dinov3.pth"
    torch.save(model.state_dict(), file)
    x = torch.randn(2, 3, 8, 20)
    with torch.no_grad():
        want = model(x).numpy()
    twin = vit_torch.Dinov3ViTModel.from_pretrained(file)
    ours = vit_flax.FlaxAutoModel.from_pretrained(file, precision="highest")
    assert type(ours) is vit_flax.FlaxDINOv3ViTModel
    assert ours.config.num_attention_heads == HEADS
    assert ours.config.image_size == 224
    with torch.no_grad():
        np.testing.assert_allclose(twin(x).last_hidden_state, want, atol=3e-6)
    np.testing.assert_allclose(ours(x.numpy()).last_hidden_state, want, atol=3e-6)

    convert(file, tmp_path / "hub", to="hub")
    convert(tmp_path / "hub", tmp_path / "back", to="dinov3")
    back = torch.load(next((tmp_path / "back").glob("*.pt*")))
    for name, value in model.state_dict().items():
        if name == "rope_embed.periods":
            continue
        if name.endswith("qkv.bias"):
            value = value * model.blocks[0].attn.qkv.bias_mask
        assert torch.equal(back[name], value), name


def test_the_newer_names_of_the_hub(tmp_path):
    """Transformers 5 calls the blocks `model.layer.0`; by itself it writes the older names."""
    twin = vit_torch.DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=32,
            patch_size=4,
            image_size=16,
            use_gated_mlp=True,
            num_register_tokens=1,
        )
    )
    twin.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "layer.0.mlp.gate_proj.weight" in tensors
    newer = {n.replace("layer.0.", "model.layer.0."): t for n, t in tensors.items()}
    save_file(newer, file, {"format": "pt"})
    read = vit_torch.AutoModel.from_pretrained(tmp_path)
    for name, value in twin.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


def test_what_another_network_has_is_refused(tmp_path):
    model = make()
    model.blocks[0].attn.qkv.bias_mask.fill_(1)
    torch.save(model.state_dict(), tmp_path / "mask.pth")
    with pytest.raises(CheckpointError, match="bias_mask` must be 1 over query and value"):
        vit_torch.DINOv3ViTModel.from_pretrained(tmp_path / "mask.pth")
    model = make()
    model.rope_embed.periods.copy_(torch.tensor([0.5, 7.0]))
    torch.save(model.state_dict(), tmp_path / "periods.pth")
    with pytest.raises(CheckpointError, match=r"must be powers of one base; given 0.5, 7"):
        vit_torch.DINOv3ViTModel.from_pretrained(tmp_path / "periods.pth")
    model.rope_embed.periods.copy_(torch.tensor([1.0, 20.0]))
    torch.save(model.state_dict(), tmp_path / "theta.pth")
    assert vit_torch.DINOv3ViTModel.from_pretrained(tmp_path / "theta.pth").config.rope_theta == 400


# Numbers of parameters in the README of facebookresearch/dinov3, in millions.
PUBLISHED = {
    "dinov3-small": 21,
    "dinov3-small-plus": 29,
    "dinov3-base": 86,
    "dinov3-large": 300,
    "dinov3-huge-plus": 840,
    "dinov3-7b": 6716,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(name):
    config = preset(name)
    count = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    assert type(config) is DINOv3ViTConfig
    assert math.isclose(count / 1e6, PUBLISHED[name], rel_tol=0.04)


def test_a_preset_takes_fields_and_refuses_other_names():
    assert preset("dinov3-7b", num_hidden_layers=1).num_hidden_layers == 1
    with pytest.raises(ConfigError, match="dinov3-base"):
        preset("dinov3-tiny")


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def peers_pixels(image, size=(224, 224)):
    """The steps of Transformers' `DINOv3ViTImageProcessorFast`: rescale, resize as torchvision does
    a tensor of floats, normalise."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] * (1 / 255)
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return ((pixels - MEAN[:, None, None]) / STD[:, None, None]).numpy()


def test_pixels_are_those_of_torch():
    processor = vit_flax.DINOv3ViTImageProcessorFast()
    rng = np.random.default_rng(0)
    for size in ((30, 40), (100, 90), (224, 500), (224, 224), (1000, 37), (600, 17)):
        image = PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        pixels = processor(image, return_tensors="np").pixel_values
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, peers_pixels(image))
    wide = processor(image, size={"height": 32, "width": 48}, return_tensors="np").pixel_values
    np.testing.assert_array_equal(wide, peers_pixels(image, (32, 48)))
    with pytest.raises(InputError, match=r"`resample` must be 2 \(BILINEAR\)"):
        vit_flax.DINOv3ViTImageProcessorFast(resample=3)


BESIDE_TRANSFORMERS = """
import sys
sys.path.insert(0, sys.argv[1])
import timm_models  # torchvision, before Transformers looks for it
import numpy as np, PIL.Image
from transformers.models.dinov3_vit.image_processing_dinov3_vit_fast import (
    DINOv3ViTImageProcessorFast as Theirs,
)
from vit_flax import AutoImageProcessor, DINOv3ViTImageProcessorFast

theirs, ours = Theirs(), DINOv3ViTImageProcessorFast()
noise = np.random.default_rng(0).integers(0, 256, (70, 101, 3), np.uint8)
image = PIL.Image.fromarray(noise)
for options in (
    {},
    {"size": {"shortest_edge": 40}},
    {"do_resize": False},
    {"do_normalize": False},
    {"do_center_crop": True, "crop_size": {"height": 33, "width": 301}},
):
    wanted = theirs(image, return_tensors="pt", **options).pixel_values.numpy()
    np.testing.assert_array_equal(ours(image, return_tensors="np", **options).pixel_values, wanted)
theirs.save_pretrained(sys.argv[2])
read = AutoImageProcessor.from_pretrained(sys.argv[2])
assert type(read) is DINOv3ViTImageProcessorFast
read.save_pretrained(sys.argv[2])
again = Theirs.from_pretrained(sys.argv[2])
wanted = again(image, return_tensors="pt").pixel_values.numpy()
np.testing.assert_array_equal(ours(image, return_tensors="np").pixel_values, wanted)
"""


@pytest.mark.slow
def test_pixels_are_those_of_transformers_on_torchvision(tmp_path):
    command = [sys.executable, "-c", BESIDE_TRANSFORMERS, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True)
