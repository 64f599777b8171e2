"""A classifier on the class token joined with the mean of the patches, beside Transformers' own
hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from networks import images, make_config, random_weights
from tolerances import BOUNDS

import vit_flax
import vit_torch
from vit_common.errors import ConfigError, InputError
from vit_convert import convert

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "image_size": 8, "patch_size": 4, "pooling": "cls_mean"}


@pytest.fixture
def saved(tmp_path):
    """A folder, and its weights."""
    config = make_config(**SIZES)
    weights = random_weights(config, "classifier")
    twin = vit_torch.ViTForImageClassification(config)
    twin.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    twin.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", weights


def test_logits_are_those_of_both_joined(saved):
    folder, weights = saved
    x = images(make_config(**SIZES), 3).astype(np.float32)
    reference = transformers.ViTModel(
        transformers.ViTConfig(**make_config(**SIZES).to_dict()), add_pooling_layer=False
    ).eval()
    rest = {name.removeprefix("vit."): torch.tensor(w).float() for name, w in weights.items()}
    kernel, bias = rest.pop("classifier.weight"), rest.pop("classifier.bias")
    reference.load_state_dict(rest)
    with torch.no_grad():
        states = reference(torch.tensor(x)).last_hidden_state
        joined = torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=-1)
        expected = (joined @ kernel.T + bias).numpy()
        theirs = vit_torch.AutoModelForImageClassification.from_pretrained(folder)(torch.tensor(x))
    ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(folder)(x)
    for found in (np.asarray(ours.logits), theirs.logits.numpy()):
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUNDS["twins float32"])


def test_formats_of_others_cannot_hold_it(saved, tmp_path):
    folder, _ = saved
    convert(folder, tmp_path / "flax", to="flax")  # proves what it wrote
    for to in ("timm", "google"):
        with pytest.raises(InputError, match="class token and the mean of the patches together"):
            convert(folder, tmp_path / to, to=to)


def test_a_representation_layer_does_not_go_with_it():
    with pytest.raises(ConfigError, match="use_representation_layer"):
        make_config(**SIZES, use_representation_layer=True)
