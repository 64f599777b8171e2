"""`vit verify`: each known fault is planted in a checkpoint or a configuration, and is named."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from networks import images, make_config, random_weights, torch_twin

from vit_cli.main import main
from vit_common.config import ViTConfig
from vit_common.embedded import embedded_checkpoint
from vit_common.image_processor import ViTImageProcessor
from vit_common.positions import resize_positions
from vit_torch import ViTForImageClassification
from vit_torch.bounds import BOUNDS
from vit_torch.diagnose import _precisions, diagnose, diagnose_pixels
from vit_torch.stages import stage_of, torch_stages
from vit_torch.verify import verify

BOUND = BOUNDS["twins float32"]


def network(**fields):
    config = make_config(hidden_size=48, num_attention_heads=4, **fields)
    return config, random_weights(config, "classifier")


def first_over(ours, theirs):
    """The first stage where two runs differ, in the order of the calls."""
    for name, value in ours.items():
        if np.abs(value - theirs[name]).max() > BOUND * max(1.0, np.abs(value).max()):
            return name
    return None


def fed(stages, name, pixels):
    """What the part that makes a stage was given."""
    if name in ("patches", "embeddings"):
        return pixels
    if name.startswith("block"):
        number = int(name.split()[1])
        return stages["embeddings" if number == 0 else f"block {number - 1}"]
    if name == "final norm":
        return [value for key, value in stages.items() if key.startswith("block")][-1]
    return stages["final norm"]


def cause(right, wrong, pixels, **inputs):
    """(first differing stage, causes) of a model with a fault against the right one."""
    ours = torch_stages(right, pixels, **inputs)
    theirs = torch_stages(wrong, pixels, **inputs)
    name = first_over(ours, theirs)
    assert name is not None, "the planted fault makes no difference"
    return name, diagnose(name, wrong, fed(ours, name, pixels), ours, BOUND)


CONFIG_FAULTS = {
    "tanh GELU": ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu'"),
    "quick GELU": ({"hidden_act": "quick_gelu"}, "hidden_act = 'gelu'"),
    "eps": ({"layer_norm_eps": 1e-3}, "layer_norm_eps = 1e-12"),
    "heads": ({"num_attention_heads": 2}, "num_attention_heads = 4"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_fault_in_the_configuration_is_named(fault):
    fields, said = CONFIG_FAULTS[fault]
    config, weights = network()
    right = torch_twin(ViTForImageClassification, config, weights)
    wrong = torch_twin(
        ViTForImageClassification, ViTConfig.from_dict(config.to_dict(), **fields), weights
    )
    stage, causes = cause(right, wrong, images(config).astype(np.float32))
    assert stage.startswith("block 0")
    assert causes[0].change == said
    assert causes[0].after <= BOUND


def swapped(*names):
    def plant(weights):
        block = "vit.encoder.layer.1.attention.attention."
        for leaf in ("weight", "bias"):
            a, b = (f"{block}{name}.{leaf}" for name in names)
            weights[a], weights[b] = weights[b], weights[a]

    return plant


def turned(name):
    def plant(weights):
        weights[name] = weights[name].T.copy()

    return plant


def reversed_channels(weights):
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weights[name] = weights[name][:, ::-1].copy()


def turned_patches(weights):
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weights[name] = weights[name].transpose(0, 1, 3, 2).copy()


def turned_positions(weights):
    name = "vit.embeddings.position_embeddings"
    grid = weights[name][:, 1:].reshape(1, 4, 4, 48).transpose(0, 2, 1, 3).reshape(1, 16, 48)
    weights[name] = np.concatenate([weights[name][:, :1], grid], 1)


def shifted_positions(weights):
    name = "vit.embeddings.position_embeddings"
    weights[name] = np.roll(weights[name], 1, axis=1)


WEIGHT_FAULTS = {
    "query and key": (swapped("query", "key"), "block 1", "query from key, key from query"),
    "key and value": (swapped("key", "value"), "block 1", "key from value, value from key"),
    "kernel": (
        turned("vit.encoder.layer.0.attention.attention.value.weight"),
        "block 0",
        "transposed kernel of attention.attention.value",
    ),
    "output kernel": (
        turned("vit.encoder.layer.0.attention.output.dense.weight"),
        "block 0",
        "transposed kernel of attention.output.dense",
    ),
    "BGR": (reversed_channels, "patches", "channels in the order BGR"),
    "patches": (turned_patches, "patches", "height and width exchanged"),
    "positions": (turned_positions, "embeddings", "rows and columns exchanged"),
    "class position": (shifted_positions, "embeddings", "positions one token earlier"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_fault_in_the_weights_is_named(fault):
    plant, where, said = WEIGHT_FAULTS[fault]
    config, weights = network()
    broken = {name: value.copy() for name, value in weights.items()}
    plant(broken)
    right, wrong = (
        torch_twin(ViTForImageClassification, config, each) for each in (weights, broken)
    )
    stage, causes = cause(right, wrong, images(config).astype(np.float32))
    assert stage.startswith(where)
    assert said in causes[0].change
    assert causes[0].after <= BOUND


@pytest.mark.parametrize(
    "rule", ["bicubic_antialias", "bilinear", "bilinear_align_corners", "bicubic_offset"]
)
def test_another_resize_rule_is_named(rule):
    config, weights = network()
    other = ViTConfig.from_dict(config.to_dict(), position_resize=rule)
    right = torch_twin(ViTForImageClassification, config, weights)
    wrong = torch_twin(ViTForImageClassification, other, weights)
    pixels = images(config, size=(48, 40)).astype(np.float32)
    stage, causes = cause(right, wrong, pixels, interpolate_pos_encoding=True)
    assert stage == "embeddings"
    assert causes[0].change == "position_resize = 'bicubic'"


def test_crossed_layer_scales_are_named():
    config, weights = network(layer_scale_init_value=0.1)
    broken = dict(weights)
    a, b = (f"vit.encoder.layer.0.lambda_{n}" for n in (1, 2))
    broken[a], broken[b] = weights[b], weights[a]
    right, wrong = (
        torch_twin(ViTForImageClassification, config, each) for each in (weights, broken)
    )
    stage, causes = cause(right, wrong, images(config).astype(np.float32))
    assert stage.startswith("block 0")
    assert causes[0].change == "layer scales crossed"


def test_a_twice_applied_layer_scale_is_named():
    config, weights = network(layer_scale_init_value=0.1)
    right = torch_twin(ViTForImageClassification, config, weights)
    squared = {n: (w * w if "lambda" in n else w) for n, w in weights.items()}
    doubled = torch_twin(ViTForImageClassification, config, squared)
    # The right one is to be changed here: it is the other that applies the scale twice.
    stage, causes = cause(doubled, right, images(config).astype(np.float32))
    assert stage.startswith("block 0")
    assert causes[0].change == "layer scale applied twice"


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 7), ("TF32", 10)])
def test_products_of_fewer_bits_are_named(name, bits):
    config, weights = network()
    model = torch_twin(ViTForImageClassification, config, weights)
    coarse = copy.deepcopy(model)
    changed = dict(_precisions(coarse.vit.encoder.layer[0]))
    coarse.vit.encoder.layer[0] = changed[f"matrix products in {name}"]
    stage, causes = cause(coarse, model, images(config).astype(np.float32))
    assert stage.startswith("block 0")
    assert causes[0].change == f"matrix products in {name}"


def test_a_fast_variance_is_named():
    """Values far from zero: the variance in one pass loses its digits."""
    config, weights = network()
    weights["vit.embeddings.position_embeddings"] = (
        weights["vit.embeddings.position_embeddings"] + 300.0
    )
    model = torch_twin(ViTForImageClassification, config, weights)
    fast = copy.deepcopy(model)

    def one_pass(module, inputs, output):
        x = inputs[0]
        mean = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) * torch.rsqrt(variance + module.eps) * module.weight + module.bias

    for module in fast.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(one_pass)
    stage, causes = cause(fast, model, images(config).astype(np.float32))
    assert stage.startswith("block 0")
    assert "fast variance" in causes[0].change


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, "0.5"),
        ({"resample": 3}, "bilinear"),
        ({"do_rescale": True, "rescale_factor": 1 / 127.5}, None),
    ],
)
def test_another_preparation_of_images_is_named(options, said):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    right = ViTImageProcessor(size=32)
    wrong = ViTImageProcessor(size=32, **options)
    wanted = np.asarray(right(picture, return_tensors="np")["pixel_values"], np.float64)
    causes = diagnose_pixels(wrong, picture, wanted, 1e-6)
    if said is None:
        assert causes == []  # not among what is known, and nothing is invented
    else:
        assert said in causes[0].change


def test_images_with_their_channels_reversed_are_named():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    processor = ViTImageProcessor(size=32)
    wanted = np.asarray(processor(picture[..., ::-1], return_tensors="np")["pixel_values"])
    causes = diagnose_pixels(processor, picture, wanted.astype(np.float64), 1e-6)
    assert causes[0].change == "channels in the order BGR"


def test_names_of_stages():
    assert stage_of("vit.encoder.layer.3.attention", "vit") == "block 3 attention"
    assert stage_of("encoder.layer.11", "dinov2") == "block 11"
    assert stage_of("vit.encoder", "vit") is None


# -- the whole


def test_the_command_on_one_checkpoint(tmp_path, capsys):
    reports = [tmp_path / f"r{suffix}" for suffix in (".html", ".json", ".md")]
    model = str(embedded_checkpoint())
    code = main(["verify", model, "--dtype", "float64", "--gradients", "--report", str(reports[1])])
    out, _ = capsys.readouterr()
    assert code == 0
    assert "within bounds" in out
    table = json.loads(reports[1].read_text())
    assert table["passed"] is True
    names = [stage["stage"]["name"] for stage in table["rows"][0]["stages"]]
    assert names[:5] == ["patches", "embeddings", "block 0 attention", "block 0 MLP", "block 0"]
    assert "logits" in names
    assert "loss" in names
    assert "gradient of embeddings.cls_token" in names
    largest = max(stage["value"] for stage in table["rows"][0]["stages"])
    assert 0 < largest < 1e-12  # float64 differs, and by its own rounding alone


def test_two_checkpoints_of_which_one_has_a_fault(tmp_path, capsys):
    source = embedded_checkpoint()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("model.safetensors", "preprocessor_config.json"):
        (broken / file).write_bytes((source / file).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["hidden_act"] = "gelu_new"
    (broken / "config.json").write_text(json.dumps(config))
    page, text = tmp_path / "r.html", tmp_path / "r.md"
    assert main(["verify", str(source), str(broken), "--report", str(page)]) == 1
    out, _ = capsys.readouterr()
    assert "first stage outside its bound is block 0 MLP" in out
    assert "it agrees with hidden_act = 'gelu'" in out
    assert "OUTSIDE bounds" in out
    assert "hidden_act = &#x27;gelu&#x27;" in page.read_text()
    assert "<svg" in page.read_text()
    assert not text.exists()


def test_a_bound_that_is_too_tight_fails():
    found = verify(embedded_checkpoint(), bounds={"twins float32": 1e-12})
    assert not found.passed
    assert found.rows[0].first_over is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify"], "wanted one or two models"),
        (["verify", "nothing-here.safetensors"], "no such file"),
        (["verify", "{m}", "--dtype", "int8"], "must be some of"),
        (["verify", "{m}", "--report", "r.pdf"], "--report must end in"),
        (["verify", "{m}", "--device", "gpu"], "there is no gpu for JAX here"),
        (["verify", "{m}", "--images", "no-such-folder"], "no-such-folder"),
    ],
)
def test_what_cannot_run_is_code_2(arguments, said, capsys):
    model = str(embedded_checkpoint())
    code = main([text.replace("{m}", model) for text in arguments])
    _, err = capsys.readouterr()
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_models_that_are_no_versions_of_each_other(tmp_path, capsys):
    config, weights = network()
    torch_twin(ViTForImageClassification, config, weights).save_pretrained(tmp_path)
    assert main(["verify", str(embedded_checkpoint()), str(tmp_path)]) == 2
    assert "are not versions of one network" in capsys.readouterr().err


def test_resampled_positions_are_those_of_both(tmp_path):
    """A checkpoint whose positions were resampled by another rule differs at the embeddings."""
    config, weights = network()
    name = "vit.embeddings.position_embeddings"
    pixels = images(config, size=(48, 48)).astype(np.float32)
    right = torch_twin(ViTForImageClassification, config, weights)
    bigger = ViTConfig.from_dict(config.to_dict(), image_size=48)
    other = {**weights, name: resize_positions(weights[name], (4, 4), (6, 6), "bilinear")}
    wrong = torch_twin(ViTForImageClassification, bigger, other)
    ours = torch_stages(right, pixels, interpolate_pos_encoding=True)
    theirs = torch_stages(wrong, pixels)
    assert first_over(ours, theirs) == "embeddings"
