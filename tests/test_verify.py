"""`vit verify`: each known fault is planted in a checkpoint or a configuration, and is named."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from networks import images, make_config, random_weights, torch_twin

import vit_cli.commands.verify
import vit_torch.verify.compare
from vit_cli.commands import verify_report
from vit_cli.main import main
from vit_common.config import BeitConfig, ViTConfig
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import ConfigError, InputError
from vit_common.images.processor import ViTImageProcessor
from vit_common.positions import resize_positions
from vit_torch import BeitForImageClassification, ViTForImageClassification, ViTModel
from vit_torch.parity import Stage, difference
from vit_torch.verify import Checked, Row, Verification, verify
from vit_torch.verify.bounds import BOUNDS
from vit_torch.verify.compare import _half, compare_models
from vit_torch.verify.diagnose import Cause, _precisions, diagnose, diagnose_pixels
from vit_torch.verify.pixels import compare_pixels
from vit_torch.verify.run import plan
from vit_torch.verify.stages import stage_of, torch_stages
from vit_torch.verify.subject import Subject

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
    P = right.config.patch_height_width
    grid = pixels.shape[2] // P[0], pixels.shape[3] // P[1]
    return name, diagnose(name, wrong, fed(ours, name, pixels), ours, BOUND, grid)


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


def test_the_real_grid_is_used():
    """Relative positions of 6 x 2 patches are not those of 3 x 4 or 4 x 3."""
    fields = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    fields |= {"image_size": 16, "patch_size": 4, "use_relative_position_bias": True}
    config = BeitConfig(**fields, layer_scale_init_value=1.0)
    torch.manual_seed(0)
    right = BeitForImageClassification(config)
    with torch.no_grad():
        for name, parameter in right.named_parameters():
            if name.endswith("_table"):
                parameter.normal_()
    wrong = BeitForImageClassification(BeitConfig(**{**config.to_dict(), "hidden_act": "relu"}))
    wrong.load_state_dict(right.state_dict())
    pixels = images(config, size=(24, 8)).astype(np.float32)
    stage, causes = cause(right, wrong, pixels, interpolate_pos_encoding=True)
    assert stage == "block 0 MLP"
    assert causes[0].change == "hidden_act = 'gelu'"
    assert causes[0].after <= BOUND


def test_nothing_explains_what_stays_infinite():
    config, weights = network()
    model = torch_twin(ViTForImageClassification, config, weights)
    stages = torch_stages(model, images(config).astype(np.float32))
    broken = {**stages, "block 0": np.full_like(stages["block 0"], np.nan)}
    assert diagnose("block 0", model, stages["embeddings"], broken, BOUND) == []
    assert diagnose("loss", model, stages["embeddings"], stages, BOUND) is None  # none was tried


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


@pytest.mark.slow
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


# -- what must not pass, or be left out without a word


def tiny(folder, cls=ViTForImageClassification, change=None, processor=None, pooler=True, **fields):
    """A checkpoint of one narrow block."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = make_config(**{**sizes, **fields})
    base = {"add_pooling_layer": pooler} if cls is ViTModel else {}
    weights = random_weights(config, None if base else "classifier", **base)
    if change is not None:
        change(weights)
    torch_twin(cls, config, weights, **base).save_pretrained(folder)
    if processor is not None:
        ViTImageProcessor(**{"size": 8, **processor}).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*weights hold NaN or infinity")
def test_an_infinite_output_is_outside_every_bound(tmp_path, capsys):
    def overflow(weights):
        weights["classifier.bias"][0] = np.inf

    right, wrong = tiny(tmp_path / "a"), tiny(tmp_path / "b", change=overflow)
    code = main(["verify", str(right), str(wrong), "--json", "--report", str(tmp_path / "r.md")])
    out, _ = capsys.readouterr()
    assert code == 1
    table = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert table["passed"] is False
    (row,) = table["rows"]
    assert row["first_over"] == "logits"
    logits = next(stage for stage in row["stages"] if stage["stage"]["name"] == "logits")
    assert logits["value"] is None
    text = (tmp_path / "r.md").read_text()
    assert "infinite or no number" in text
    assert "none of the known causes" in text
    assert "becomes inf" not in text


@pytest.mark.parametrize(("value", "bound"), [(np.inf, np.inf), (np.nan, 1.0), (0.0, np.nan)])
def test_what_is_not_finite_is_outside(value, bound):
    assert not Checked(Stage("logits", value, 1.0, ()), bound, value).passed


def test_half_precision_beside_a_twin_that_overflowed():
    exact = np.ones((2, 3))
    assert not _half("logits", exact + 0.1, np.full((2, 3), np.inf), exact).passed
    assert _half("logits", exact + 0.01, exact + 0.01, exact).passed


def report_of(rows, notes=()):
    return Verification("a", "b", "vit", "classifier", (8, 8), 2, rows, {}, list(notes))


def row_of(stages=(), unmatched=(), causes=None):
    return Row("cpu", "float32", "highest", "b", "absolute", list(stages), list(unmatched), causes)


GOOD = Checked(Stage("logits", 0.0, 1.0, (0, 0)), 1e-5, 0.0)
BAD = Checked(Stage("logits", 1.0, 1.0, (0, 0)), 1e-5, 1.0)


def test_nothing_compared_is_nothing_passed():
    assert not report_of([]).passed
    assert not report_of([row_of()]).passed
    assert not report_of([row_of([GOOD], ["a alone has pooled"])]).passed
    assert report_of([row_of([GOOD])]).passed


@pytest.mark.parametrize(
    ("row", "said", "unsaid"),
    [
        (row_of([BAD]), "no cause was looked for", "none of the known causes"),
        (row_of([BAD], causes=[]), "none of the known causes", "was looked for"),
        (row_of([BAD], causes=[Cause("x", 1.0, 0.0)]), "it agrees with x: 1 becomes 0", "none of"),
        (row_of([BAD], causes=[Cause("x", 1.0, 0.5)]), "it comes closest with x", "it agrees"),
        (row_of([], ["a alone has pooled"]), "a alone has pooled", "cause"),
    ],
)
def test_every_report_says_why(row, said, unsaid, capsys):
    found = report_of([row], ["gradients were left out"])
    vit_cli.commands.verify._print(found)
    for text in (capsys.readouterr().out, verify_report.markdown(found), verify_report.html(found)):
        assert said in text
        assert unsaid not in text
        assert "gradients were left out" in text
        assert "FAIL" in text


def test_what_is_left_out_is_said():
    tpu, cpu = (SimpleNamespace(platform=name) for name in ("tpu", "cpu"))
    runs, notes = plan([tpu, cpu], ("float64", "bfloat16"), True)
    assert runs == [(cpu, "float64", "highest"), (tpu, "bfloat16", "highest")] + [
        (cpu, "bfloat16", "highest")
    ]
    assert len(notes) == 2
    assert "float64 was left out on the tpu" in notes[0]
    assert "gradients were left out in bfloat16" in notes[1]
    with pytest.raises(InputError, match=r"nothing of what was asked for.*float64 was left out"):
        plan([tpu], ("float64",), False)
    with pytest.raises(InputError, match=r"nothing of what was asked for.*gradients were left out"):
        plan([cpu], ("bfloat16", "float16"), True)
    for name in ("dtypes", "devices"):
        with pytest.raises(InputError, match=f"`{name}` must be of .*; given none"):
            verify(embedded_checkpoint(), **{name: ()})


def row_of_fakes(monkeypatch, stages, gradients, precision="highest"):
    """A row of two models that are nothing but (the first's, the second's) stages and gradients."""
    both = [SimpleNamespace(name=name, flax=lambda *_, i=i: i) for i, name in enumerate("ab")]
    monkeypatch.setattr(vit_torch.verify.compare, "flax_stages", lambda i, *_: stages[i])
    monkeypatch.setattr(vit_torch.verify.compare, "flax_gradients", lambda i, *_: gradients[i])
    cpu = jax.local_devices(backend="cpu")[0]
    return compare_models(*both, np.ones((2, 3, 8, 8)), {}, cpu, "float32", precision, BOUNDS, True)


def test_stages_and_parameters_of_one_model_alone(monkeypatch):
    one = np.ones((2, 4))
    same = {"embeddings": one, "final norm": one}
    many = {f"encoder.layer.{i}.attention.attention.query.bias": one for i in range(6)}
    assert row_of_fakes(monkeypatch, (same, same), (many, many)).passed
    row = row_of_fakes(monkeypatch, (same, same), ({"cls_token": one}, many | {"cls_token": one}))
    assert not row.passed
    assert row.first_over is None
    (text,) = row.unmatched
    assert text.startswith("b alone has gradient of encoder.layer.0.attention.attention.query.bias")
    assert text.endswith(" and 2 more")
    wide = {**same, "embeddings": np.ones((2, 5))}
    row = row_of_fakes(monkeypatch, ({**same, "pooled": one}, wide), (many, many))
    assert not row.passed
    assert row.unmatched == [
        "a alone has pooled",
        "the shapes differ: embeddings (2, 4) and (2, 5)",
    ]


def test_gradients_at_the_default_precision_have_the_bound_of_activations(monkeypatch):
    stages, gradients = {"logits": np.ones((2, 4))}, {"classifier.bias": np.ones(4)}
    for precision, bound in (("highest", BOUNDS["gradients float32"]), ("default", 2.0**-6)):
        row = row_of_fakes(monkeypatch, (stages, stages), (gradients, gradients), precision)
        assert [checked.stage.name for checked in row.stages][1:] == ["gradient of classifier.bias"]
        assert row.stages[1].bound == bound


def test_a_pooler_of_one_model_alone(tmp_path, capsys):
    right = tiny(tmp_path / "a", ViTModel)
    wrong = tiny(tmp_path / "b", ViTModel, pooler=False)
    assert main(["verify", str(right), str(wrong)]) == 1
    assert f"{right} alone has pooled" in capsys.readouterr().out


GREY = {"num_channels": 1, "processor": {"image_mean": [0.5], "image_std": [0.5]}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_mean": [0.5], "image_std": [0.5], "rescale_factor": 0.01}, None),
        ({"image_mean": [0.0], "image_std": [1.0]}, "mean and standard deviation 0.5"),
        (
            {"image_mean": [0.5], "image_std": [0.5], "do_normalize": False},
            "mean and standard deviation 0.5",
        ),
        ({"image_mean": [0.5], "image_std": [0.5], "resample": 0}, "resize filter bilinear"),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_grey_images_that_are_prepared_otherwise(given, options, said, tmp_path):
    pictures = None
    if given:
        noise = np.random.default_rng(0).integers(0, 256, (2, 20, 30), np.uint8)
        pictures = [PIL.Image.fromarray(values) for values in noise]
    right = Subject(tiny(tmp_path / "a", **GREY), None, {})
    wrong = Subject(tiny(tmp_path / "b", num_channels=1, processor=options), None, {})
    assert compare_pixels(right, right, pictures).passed
    row = compare_pixels(right, wrong, pictures)
    assert not row.passed
    assert [checked.stage.name for checked in row.stages] == ["pixels"]
    assert [cause.change for cause in row.agreeing] == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (None, "nothing says how for .*b$"),
        ({"image_mean": [0.5], "image_std": [0.5], "size": 12}, r"\(1, 8, 8\) and \(1, 12, 12\)"),
        ({}, r"\(1, 8, 8\) and \(3, 8, 8\)"),  # in colour
    ],
)
def test_images_that_cannot_be_compared(options, said, tmp_path):
    right = Subject(tiny(tmp_path / "a", **GREY), None, {})
    wrong = Subject(tiny(tmp_path / "b", num_channels=1, processor=options), None, {})
    found = compare_pixels(right, wrong, None)
    if options is None:
        text = found
    else:
        assert not found.passed
        (text,) = verify_report.remarks(found)
    assert re.search(said, text)


def test_another_preparation_fails_and_is_said(tmp_path, capsys):
    right = tiny(tmp_path / "a", **GREY)
    wrong = tiny(tmp_path / "b", num_channels=1, processor={"size": 12})
    assert main(["verify", str(right), str(wrong)]) == 1
    out, _ = capsys.readouterr()
    assert "pixels: prepared as (1, 8, 8) and (3, 12, 12)" in out
    assert "OUTSIDE bounds" in out


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"problem_type": "multi_label_classification"}, (2, 5)),
        ({"problem_type": "regression", "num_labels": 3}, (2, 3)),
        ({"num_labels": 1}, (2, 1)),
        ({}, (2,)),
    ],
)
def test_every_classifier_has_a_loss(fields, shape, tmp_path):
    path = tiny(tmp_path, **fields)
    assert Subject(path, None, {}).extra_inputs(2, (8, 8))["labels"].shape == shape
    if "problem_type" in fields:
        found = verify(path)
        assert found.passed
        assert "loss" in [checked.stage.name for checked in found.rows[0].stages]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_channels": 1}, "num_channels 3 and 1"),
        (
            {"problem_type": "multi_label_classification"},
            "problem_type 'single_label_classification' and 'multi_label_classification'",
        ),
    ],
)
def test_other_inputs_or_another_loss_make_another_network(fields, said, tmp_path):
    right, wrong = tiny(tmp_path / "a"), tiny(tmp_path / "b", **fields)
    with pytest.raises(ConfigError, match=f"are not versions of one network: {said}"):
        verify(right, wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--report", "r.json"], "--report"),
        (["--gradients", "--image-size", "16"], "--gradients, --image-size"),
        (["--images", "."], "--images"),
        (["--dtype", "float32,bfloat16"], "more than one --dtype"),
    ],
)
def test_without_a_tpu_what_compiling_cannot_take_is_refused(options, said, capsys, monkeypatch):
    monkeypatch.setattr(vit_cli.commands.verify, "_has", lambda name: False)
    assert main(["verify", str(embedded_checkpoint()), "--device", "tpu", *options]) == 2
    assert f"given {said}, which that cannot take" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    report = tmp_path / "nowhere" / "r.html"
    assert main(["verify", str(embedded_checkpoint()), "--report", str(report)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no such directory" in err


def test_a_batch_beside_images_is_refused(tmp_path, capsys):
    PIL.Image.new("L", (8, 8)).save(tmp_path / "a.png")
    arguments = ["--images", str(tmp_path), "--batch", "5"]
    assert main(["verify", str(embedded_checkpoint()), *arguments]) == 2
    assert "`batch` is of random images; given 5" in capsys.readouterr().err


def test_infinity_on_both_sides_is_no_agreement():
    assert np.isnan(difference("logits", [np.inf], [np.inf]).max_abs)


def test_the_plot_of_a_report():
    """One line for each run of the networks; stages without a difference lie on a line of 0."""

    def stage(name, error):
        return Checked(Stage(name, error, 1.0, (0,)), 1.0, error)

    pixels = row_of([stage("pixels", 0.5)])
    first = row_of([stage("patches", 0.0), stage("block 0", 1e-4), stage("logits", 1e-3)])
    second = row_of([stage("patches", 1e-5), stage("block 0", 1e-4), stage("logits", 1e-3)])
    page = verify_report.html(report_of([pixels, first, second]))
    assert page.count("<polyline") == 2
    paths = [
        [tuple(map(float, point.split(","))) for point in path.split()]
        for path in re.findall(r"<polyline points='([^']*)'", page)
    ]
    (zero,) = (float(y) for y in re.findall(r"y1='(\d+)' y2='\d+' stroke='#999'", page))
    assert paths[0][0][1] == zero
    assert paths[1][0][1] < zero
    assert paths[0][1:] == paths[1][1:]
    assert page.count("<h2>preprocessing, against b</h2>") == 1
    assert "stroke='#999'" not in verify_report.html(report_of([second]))
