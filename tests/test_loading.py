"""How a checkpoint is opened, and what may be left over of it: both twins, and `convert`."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from networks import make_config, randomize
from safetensors.torch import save_file
from test_hub import hub, waits  # noqa: F401  # fixtures
from test_hub_families import serve
from timm_models import timm

import vit_flax
import vit_torch
from vit_flax.inference import ImageClassifier, ImageEncoder

_opened: list[str] | None = None


def _audit(event: str, args: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], str):
        _opened.append(args[0])


sys.addaudithook(_audit)  # what Python itself says; there is no taking it away again


@pytest.fixture
def opened():
    """Names of the files that are opened while the test runs."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A folder that Transformers wrote."""
    folder = tmp_path_factory.mktemp("hub")
    config = transformers.ViTConfig(**make_config(num_hidden_layers=1).to_dict())
    randomize(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A folder with timm's weights alone, and its logits for `pixels()`."""
    folder = tmp_path_factory.mktemp("timm")
    model = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES).eval())
    save_file(model.state_dict(), folder / "model.safetensors")
    with torch.no_grad():
        return folder, model(torch.tensor(pixels())).numpy()


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


def logits(model) -> np.ndarray:
    if isinstance(model, ImageClassifier):
        model = model.model
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.tensor(pixels())).logits.numpy()
    return np.asarray(model(pixels()).logits)


CLASSES = [
    vit_flax.FlaxViTForImageClassification,
    vit_flax.FlaxAutoModelForImageClassification,
    ImageClassifier,
    vit_torch.ViTForImageClassification,
    vit_torch.AutoModelForImageClassification,
]
TIMM = {"format": "timm", "num_attention_heads": 4}


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["hub", "timm"])
def test_a_checkpoint_is_opened_once(hub_folder, timm_folder, kind, cls, opened):
    folder = hub_folder if kind == "hub" else timm_folder[0]
    options = {} if kind == "hub" else TIMM
    more = {} if "torch" in cls.__module__ else {"precision": "highest"}
    model = cls.from_pretrained(folder, **options, **more)
    count = [name for name in opened if name.startswith(str(folder))]
    assert count.count(str(folder / "model.safetensors")) == 1, count
    assert count.count(str(folder / "config.json")) == (kind == "hub")
    if kind == "timm":
        np.testing.assert_allclose(logits(model), timm_folder[1], rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.filterwarnings("ignore:.*not used")
def test_other_ways_in_open_once_too(hub_folder, opened):
    weights = str(hub_folder / "model.safetensors")
    ImageEncoder.from_pretrained(hub_folder, num_labels=make_config().num_labels)
    vit_flax.FlaxAutoModel.from_pretrained(hub_folder, _do_init=False)
    vit_torch.AutoModel.from_pretrained(hub_folder, config=hub_folder, output_attentions=True)
    config = vit_flax.AutoConfig.from_pretrained(hub_folder)
    vit_flax.FlaxViTModel.from_pretrained(weights, config=config, add_pooling_layer=False)
    assert opened.count(weights) == 4


@pytest.mark.parametrize("cls", CLASSES)
def test_a_name_on_the_hub_is_resolved_once(hub, hub_folder, cls):  # noqa: F811
    serve(hub, "someone/vit", hub_folder)
    cls.from_pretrained("someone/vit")
    for name in ("/config.json", "/model.safetensors"):
        assert len(hub.asked("GET", name)) == 1
    # One question whether the Hub is there, then each file's own.
    asked = [path.split("/")[-1] for path, _ in hub.asked("HEAD")]
    assert asked[:3] == ["config.json", "config.json", "model.safetensors"]
    assert len(asked) == (4 if cls is ImageClassifier else 3)
    assert hub.asked("GET", "/api/") == []


@pytest.mark.parametrize("cls", CLASSES)
def test_what_the_configuration_refuses_costs_no_download(hub, hub_folder, cls):  # noqa: F811
    serve(hub, "someone/vit", hub_folder)
    with pytest.raises(ValueError, match="has no keyword 'hiden_size'"):
        cls.from_pretrained("someone/vit", hiden_size=3)
    assert hub.asked("HEAD", "model.safetensors") == hub.asked("GET", "model.safetensors") == []


def test_all_files_are_of_one_commit(hub, hub_folder, monkeypatch):  # noqa: F811
    """What is pushed between two files of one load does not mix with what was there."""
    from vit_common.files import hub as module

    serve(hub, "someone/vit", hub_folder)
    repository = hub.repositories["someone/vit"]
    original = module._download

    def pushed_meanwhile(place, filename, *args):
        path = original(place, filename, *args)
        repository.commit({"model.safetensors": b"of another network"})
        return path

    monkeypatch.setattr(module, "_download", pushed_meanwhile)
    vit_torch.ViTForImageClassification.from_pretrained("someone/vit")


def test_other_names_of_weights_are_found_by_one_question(hub, hub_folder, tmp_path):  # noqa: F811
    model = transformers.ViTForImageClassification.from_pretrained(hub_folder)
    model.save_pretrained(tmp_path, safe_serialization=False)
    serve(hub, "someone/old", tmp_path)
    vit_torch.ViTForImageClassification.from_pretrained("someone/old")
    asked = [path.split("/")[-1] for path, _ in hub.asked("HEAD")]
    assert asked == ["config.json", "config.json", "model.safetensors", "pytorch_model.bin"]
    assert len(hub.asked("GET", "/api/models/someone/old")) == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_without_a_configuration_are_asked_for_it(hub_folder, tmp_path, cls):
    """The Hub's own layout is never without a config.json, whichever way it is loaded."""
    (tmp_path / "model.safetensors").write_bytes((hub_folder / "model.safetensors").read_bytes())
    with pytest.raises(OSError, match=r"config\.json: no such file; there is model\.safetensors"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_repository_without_weights_says_what_there_is(hub, hub_folder, cls):  # noqa: F811
    files = {"config.json": (hub_folder / "config.json").read_bytes(), "tf_model.h5": b""}
    hub.add("someone/tf", files)
    with pytest.raises(OSError, match=r"there is config\.json, tf_model\.h5\."):
        cls.from_pretrained("someone/tf")
    assert json.loads(files["config.json"])["model_type"] == "vit"
