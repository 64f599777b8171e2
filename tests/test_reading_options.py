"""--from, --heads, --image-size and --set: every command that takes a model reads what its files do
not say."""

from __future__ import annotations

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import make_config, random_weights
from tolerances import BOUNDS

from vit_cli import models
from vit_cli.commands import bench
from vit_cli.main import main
from vit_convert import convert
from vit_torch import ViTForImageClassification, ViTModel

# Neither the format nor the number of heads is in such a file.
GIVEN = ["--from", "dino", "--heads", "4"]
ATOL = BOUNDS["reference float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone as DINO publishes them, a classifier as timm does, an image; and both models as
    Transformers has them."""
    folder = tmp_path_factory.mktemp("models")
    config = make_config(layer_norm_eps=1e-6)
    for cls, head, to, name in (
        (ViTModel, None, "dino", "backbone"),
        (ViTForImageClassification, "classifier", "timm", "classifier"),
    ):
        options = {} if head else {"add_pooling_layer": False}
        twin = cls(config, **options)
        twin.load_state_dict(
            {n: torch.tensor(np.asarray(w)) for n, w in random_weights(config, head).items()},
            strict=False,
        )
        twin.save_pretrained(folder / name)
        convert(folder / name, folder / f"{name}.pth", to=to)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "a.png")
    return folder


def dino_pixels(place):
    """As DINO evaluates: the shorter side to 256 for 224, so to 36 for 32."""
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with PIL.Image.open(place / "a.png") as image:
        return processor(image, return_tensors="pt")


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.mark.parametrize(
    "command",
    [
        ["info", "{p}/backbone.pth"],
        ["features", "{p}/a.png", "--model", "{p}/backbone.pth", "--output", "{p}/no.npz"],
        ["attention", "{p}/a.png", "--model", "{p}/backbone.pth", "--output", "{p}/no.png"],
        ["predict", "{p}/a.png", "--model", "{p}/classifier.pth"],
        ["bench", "{p}/a.png", "--model", "{p}/classifier.pth"],
        ["export", "{p}/backbone.pth", "{p}/no.jaxexport", "--output", "features"],
        ["verify", "{p}/backbone.pth"],
        ["inspect", "{p}/backbone.pth"],
        ["convert", "{p}/backbone.pth", "{p}/no", "--to", "hub"],
    ],
    ids=lambda command: command[0],
)
def test_what_is_advised_can_be_given(place, command, capsys):
    """The errors name an option, the command takes it, and the next error is another."""
    command = [part.format(p=place) for part in command]

    def said(*options):
        code, out, err = run(capsys, *command, *options)
        assert (code, err) != (0, "") or command[0] == "inspect"
        return out + err

    first = said()
    if "classifier" not in " ".join(command):
        assert "`--from` of the command" in first
    assert "`--heads` of the command" in said("--from", "timm")
    wrong = said("--from", "timm", "--heads", "5")
    assert "must be a multiple of `num_attention_heads`" in wrong
    # All resample to that size, but to none that the patch does not divide.
    assert (
        "must be a multiple of the patch"
        in said(*GIVEN[2:], "--from", "timm", "--image-size", "52")
        or command[0] == "verify"
    )
    assert "did you mean hidden_act" in said("--set", "hidden_atc=relu")
    assert "--set must be FIELD=VALUE" in said("--set", "hidden_act")


@pytest.mark.filterwarnings("default")
def test_features(place, tmp_path, capsys):
    target = tmp_path / "f.npz"
    arguments = [place / "a.png", "--model", place / "backbone.pth", "--output", target]
    code, _, err = run(capsys, "features", *arguments, *GIVEN, "--set", "layer_norm_eps=1e-3")
    assert code == 0
    model = transformers.ViTModel.from_pretrained(
        place / "backbone", add_pooling_layer=False, layer_norm_eps=1e-3
    )
    with torch.no_grad():
        expected = model(**dino_pixels(place)).last_hidden_state[0, 0].numpy()
    with np.load(target) as found:
        np.testing.assert_allclose(found["features"][0], expected, rtol=0, atol=ATOL)
        made_with = json.loads(str(found["made_with"]))
    assert made_with["format"] == "dino"
    assert made_with["num_attention_heads"] == 4
    # A run is resumed with what it was begun with, these options among it.
    rows = [{"run": made_with}, {"file": "x", "error": "broken"}]
    (tmp_path / "g.npz.partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments[-1] = tmp_path / "g.npz"
    code, _, err = run(capsys, "features", *arguments, "--from", "dino", "--heads", 8, "--resume")
    assert code == 2
    assert "num_attention_heads 4, now 8" in err


@pytest.mark.filterwarnings("default")
def test_predict(place, capsys):
    arguments = [place / "a.png", "--model", place / "classifier.pth", "--from", "timm"]
    code, out, _ = run(capsys, "predict", *arguments, "--heads", 4, "--json")
    assert code == 0
    model = transformers.ViTForImageClassification.from_pretrained(place / "classifier")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    with PIL.Image.open(place / "a.png") as image, torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0].numpy()
    for each in json.loads(out)["predictions"]:
        assert each["probability"] == pytest.approx(expected[each["index"]], abs=ATOL)


def test_info_and_inspect(place, capsys):
    code, out, _ = run(capsys, "info", place / "backbone.pth", *GIVEN, "--json")
    model = json.loads(out)["model"]
    assert (code, model["heads"], model["weights"]["format"]) == (0, 4, "dino")
    code, out, _ = run(capsys, "inspect", place / "backbone.pth", *GIVEN, "--json")
    network = json.loads(out)["network"]
    assert (code, network["heads"], network["format"]) == (0, 4, "dino")


def test_attention_and_export(place, tmp_path, capsys):
    arguments = [place / "a.png", "--model", place / "backbone.pth", "--output", tmp_path / "a.png"]
    assert run(capsys, "attention", *arguments, *GIVEN)[0] == 0
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.width > 32
    out = tmp_path / "m.jaxexport"
    options = ["--output", "features", "--platforms", "cpu", "--no-check"]
    assert run(capsys, "export", place / "backbone.pth", out, *options, *GIVEN)[0] == 0


def test_bench(place, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(models, "load_for_inference", lambda *_, **options: seen.append(options))
    monkeypatch.setattr(bench, "describe", lambda *_: pytest.skip.Exception)
    run(capsys, "bench", "--model", place / "backbone.pth", *GIVEN, "--image-size", "32x48")
    (options,) = seen
    assert (options["format"], options["num_attention_heads"]) == ("dino", 4)
    assert options["image_size"] == (32, 48)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", ["predict", "features", "export", "verify"])
def test_what_may_be_left_out(place, tmp_path, command, capsys):
    """Tensors that change the network are an error that names the option."""
    weights = torch.load(place / "classifier.pth")
    torch.save({**weights, "attn_pool.q.weight": torch.ones(48, 48)}, tmp_path / "more.pth")
    model, given = tmp_path / "more.pth", ["--from", "timm", "--heads", 4]
    arguments = {
        "predict": [place / "a.png", "--model", model, "--json"],
        "features": [place / "a.png", "--model", model, "--output", tmp_path / "f.npz"],
        "export": [model, tmp_path / "m.jaxexport", "--platforms", "cpu", "--no-check"],
        "verify": [model],
    }[command]
    code, _, err = run(capsys, command, *arguments, *given)
    assert code == 2
    assert "attn_pool" in err
    assert "--ignore" in err
    assert run(capsys, command, *arguments, *given, "--ignore", "attn_pool.*")[0] == 0


def test_errors_advise_no_option_that_the_command_lacks(capsys):
    """Every option that an error of reading a model names is one of every such command."""
    for command in ("predict", "features", "attention", "bench", "export", "verify", "info"):
        assert main([command, "--help"]) == 0
        options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert {"--from", "--heads", "--image-size", "--set", "--revision"} <= options
        assert ("--ignore" in options) is (command != "info")
