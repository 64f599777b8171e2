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


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
@pytest.mark.parametrize("cls", CLASSES)
def test_what_was_loaded_once_loads_without_the_hub(hub, hub_folder, tmp_path, cls):  # noqa: F811
    """Also a file that the repository does not have is remembered."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((hub_folder / name).read_bytes())
    serve(hub, "someone/vit", tmp_path)
    commit = hub.repositories["someone/vit"].refs["main"]
    first = cls.from_pretrained("someone/vit")
    hub.status["*"] = 503
    for name, options in (
        ("someone/vit", {}),
        ("someone/vit", {"local_files_only": True}),
        (f"someone/vit@{commit}", {}),
        ("someone/vit", {"revision": commit}),
    ):
        again = cls.from_pretrained(name, **options)
        np.testing.assert_array_equal(logits(again), logits(first))
    with pytest.raises(OSError, match=r"not in the cache, and the Hub answers 503; try again"):
        cls.from_pretrained("someone/vit", revision="other")


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


@pytest.mark.parametrize("shards", [False, True])
def test_a_description_fetches_small_files_only(hub, hub_folder, tmp_path, shards):  # noqa: F811
    from vit_cli.commands.info import describe_model
    from vit_cli.options import Reading

    model = transformers.ViTForImageClassification.from_pretrained(hub_folder)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    serve(hub, "someone/vit", tmp_path)
    said = describe_model("someone/vit", Reading())
    assert said["parameters"] == model.num_parameters()
    assert hub.asked("GET", ".safetensors") == hub.asked("HEAD", ".safetensors") == []
    # What is here already is looked at, and nothing else is fetched.
    vit_torch.AutoModelForImageClassification.from_pretrained("someone/vit")
    count = len(hub.asked("GET", ".safetensors"))
    assert count == (1 if not shards else 1 + len(list(tmp_path.glob("*-of-*"))))
    again = describe_model("someone/vit", Reading())
    assert again["weights"]
    assert len(hub.asked("GET", ".safetensors")) == count


# -- options of Transformers


INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
HEADS = {None: "Model", "classifier": "ForImageClassification"}


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.filterwarnings("ignore:.*not used")
@pytest.mark.parametrize(
    ("of", "into", "options"),
    [
        ("classifier", "classifier", {}),
        ("classifier", "classifier", {"num_labels": 3, "ignore_mismatched_sizes": True}),
        ("classifier", None, {}),
        (None, "classifier", {}),
        (None, None, {"add_pooling_layer": False}),
    ],
)
def test_what_loading_says_is_what_transformers_says(tmp_path, of, into, options):
    config = transformers.ViTConfig(**make_config(num_hidden_layers=1).to_dict())
    getattr(transformers, f"ViT{HEADS[of]}")(config).save_pretrained(tmp_path)
    name = f"ViT{HEADS[into]}"
    theirs = getattr(transformers, name)
    _, want = theirs.from_pretrained(tmp_path, output_loading_info=True, **options)
    for cls in (getattr(vit_torch, name), getattr(vit_flax, f"Flax{name}")):
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert type(model) is cls
        assert tuple(info) == INFO
        for key in INFO:
            got, wanted = (sorted(map(tuple_of, side[key])) for side in (info, want))
            assert got == wanted, key
    model, params, info = getattr(vit_flax, f"Flax{name}").from_pretrained(
        tmp_path, output_loading_info=True, _do_init=False, **options
    )
    assert sorted(info) == sorted(INFO)
    assert params


def tuple_of(value):
    return value if isinstance(value, str) else tuple(map(str, value))


@pytest.mark.parametrize("auto", [vit_torch.AutoModel, vit_flax.FlaxAutoModel])
def test_auto_classes_take_them_too(hub_folder, auto):
    options = {"add_pooling_layer": False, "trust_remote_code": True, "torchscript": True}
    with pytest.warns(UserWarning, match="not used: classifier"):
        model, info = auto.from_pretrained(hub_folder, output_loading_info=True, **options)
    assert info["unexpected_keys"] == ["classifier.bias", "classifier.weight"]
    # `torchscript` asks for tuples, there and here.
    theirs = transformers.ViTConfig.from_pretrained(hub_folder, torchscript=True)
    assert model.config.use_return_dict == theirs.use_return_dict == False  # noqa: E712


@pytest.mark.parametrize("where", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", None])
def test_a_device_map_of_one_device(hub_folder, where):
    options = {"low_cpu_mem_usage": True, "offload_folder": None}
    auto = vit_torch.AutoModelForImageClassification
    model = auto.from_pretrained(hub_folder, device_map=where, **options)
    assert {p.device.type for p in model.parameters()} == {
        "cuda" if where == "auto" and torch.cuda.is_available() else "cpu"
    }
    assert getattr(model, "hf_device_map", None) == (None if where is None else {"": model.device})


@pytest.mark.parametrize("where", ["gpu!", -1, True, {"vit": "cpu", "classifier": "meta"}, {}])
def test_a_device_map_that_is_none(hub_folder, where):
    with pytest.raises(ValueError, match=r"`device_map` must .*; given"):
        vit_torch.ViTForImageClassification.from_pretrained(hub_folder, device_map=where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_dtypes_of_new_models(dtype):
    config = transformers.ViTConfig(**make_config(num_hidden_layers=1).to_dict())
    for key in ("dtype", "torch_dtype"):
        theirs = transformers.AutoModel.from_config(config, **{key: dtype})
        model = vit_torch.AutoModel.from_config(config, trust_remote_code=False, **{key: dtype})
        assert model.dtype is theirs.dtype
    assert vit_flax.FlaxAutoModel.from_config(config, trust_remote_code=False).params


@pytest.mark.parametrize("package", [vit_flax, vit_torch])
def test_warnings_point_at_the_caller(hub_folder, package):
    """However deep they are, and through whichever class."""
    prefix = "Flax" if package is vit_flax else ""
    for name in ("AutoModel", "ViTModel"):
        with pytest.warns(UserWarning, match="newly initialized") as said:
            getattr(package, prefix + name).from_pretrained(hub_folder)
        assert [warning.filename for warning in said] == [__file__]
