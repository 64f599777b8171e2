"""Models of other projects straight from a Hub: timm's repositories, and the families' own."""

from __future__ import annotations

import json
import re

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hub_server import HubServer
from networks import randomize
from saved_models import framework_fixture, made  # noqa: F401  # fixtures
from test_hub import hub, uploads, waits  # noqa: F401  # fixtures
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.files import hub as hub_module
from vit_flax.inference import ImageClassifier

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def serve(server: HubServer, name: str, folder) -> None:
    from hub_server import Repository

    repository = server.repositories.setdefault(name, Repository())
    repository.commit({file.name: file.read_bytes() for file in folder.iterdir()})


@pytest.fixture
def timm_repository(hub, tmp_path):  # noqa: F811
    from safetensors.torch import save_file

    model = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES).eval())
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "num_features": 48,
        "global_pool": "token",
        "model_args": SIZES,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "label_names": None,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    serve(hub, "timm/vit_tiny", folder)
    return model


def test_a_repository_of_timm(timm_repository):
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = timm_repository(torch.tensor(x)).numpy()
    flax = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
        "timm/vit_tiny", precision="highest"
    )
    twin = vit_torch.AutoModelForImageClassification.from_pretrained("timm/vit_tiny")
    np.testing.assert_allclose(np.asarray(flax(x).logits), wanted, rtol=0, atol=2e-5)
    with torch.no_grad():
        np.testing.assert_allclose(twin(torch.tensor(x)).logits, wanted, rtol=0, atol=2e-5)
    classify = ImageClassifier.from_pretrained("timm/vit_tiny")
    assert classify.image_processor.crop_size == {"height": 32, "width": 32}
    assert classify.image_processor.image_mean == [0.485, 0.456, 0.406]


def test_a_repository_of_a_family(hub, tmp_path):  # noqa: F811
    config = transformers.Dinov2Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        num_labels=3,
    )
    model = randomize(transformers.Dinov2ForImageClassification(config).eval())
    model.save_pretrained(tmp_path / "m")
    transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(tmp_path / "m")
    serve(hub, "facebook/dinov2", tmp_path / "m")
    x = np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.tensor(x)).logits.numpy()
    flax = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
        "facebook/dinov2", precision="highest"
    )
    assert type(flax).__name__ == "FlaxDinov2ForImageClassification"
    np.testing.assert_allclose(np.asarray(flax(x).logits), wanted, rtol=0, atol=2e-5)
    assert vit_flax.AutoConfig.from_pretrained("facebook/dinov2").model_type == "dinov2"
    processor = vit_flax.AutoImageProcessor.from_pretrained("facebook/dinov2")
    assert type(processor).__name__ == "BitImageProcessor"


@pytest.mark.parametrize("cls", [vit_flax.FlaxViTModel, vit_torch.ViTModel])
def test_a_model_asks_for_its_configuration_once(hub, tmp_path, cls, monkeypatch):  # noqa: F811
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "m")
    serve(hub, "someone/vit", tmp_path / "m")
    downloads = []
    original = hub_module._download

    def counted(place, filename, *args):
        downloads.append(filename)
        return original(place, filename, *args)

    monkeypatch.setattr(hub_module, "_download", counted)
    cls.from_pretrained("someone/vit")
    assert downloads == ["config.json", "model.safetensors"]


def as_card(repository) -> huggingface_hub.ModelCard:
    text = repository.commits[repository.refs["main"]]["README.md"].decode()
    return huggingface_hub.ModelCard(text)


@uploads
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_the_model_card_of_an_upload(hub, tmp_path, framework, way):  # noqa: F811
    """It says what huggingface_hub reads out of it, and its code runs."""

    def push(model, **options):
        if way == "push_to_hub":
            model.push_to_hub("someone/vit", **options)
        else:
            model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/vit", **options)

    model = made(framework, "classifier")
    model.add_model_tags(["cats", "dogs"])
    push(model, token="hf_write")
    repository = hub.repositories["someone/vit"]
    card = as_card(repository)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vitflax", "cats", "dogs"],
    }
    for code, twin in zip(
        re.findall(r"```python\n(.+?)```", card.text, re.S),
        (vit_flax.FlaxViTForImageClassification, vit_torch.ViTForImageClassification),
        strict=True,
    ):
        names: dict = {}
        exec(code, names)
        assert type(names["model"]) is twin
    assert (tmp_path / "README.md").exists() == (way == "save_pretrained")
    mine = b"---\nlicense: mit\ntags:\n- cats\n---\n# Mine\n"
    repository.commit({"README.md": mine})
    push(model, use_auth_token="hf_write")
    theirs = transformers.utils.hub.create_and_tag_model_card("someone/vit", ["cats", "dogs"])
    assert as_card(repository).data.to_dict() == theirs.data.to_dict()
    assert as_card(repository).text.strip() == "# Mine"


@uploads
def test_model_cards_of_other_models(hub, framework):  # noqa: F811
    made(framework, None).push_to_hub("someone/base", token="hf_write")
    card = as_card(hub.repositories["someone/base"])
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["vitflax"]}
    # Transformers cannot hold this network.
    made(framework, "classifier", num_register_tokens=1).push_to_hub(
        "someone/more", token="hf_write"
    )
    assert as_card(hub.repositories["someone/more"]).data.library_name == "vitflax"
