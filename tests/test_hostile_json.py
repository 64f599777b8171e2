"""Configurations and processors from JSON that nobody should have written: each loads, or is
refused on purpose, shortly."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError, ViTError, shown
from vit_common.families import CONFIG_MAPPING, AutoConfig
from vit_common.images.auto import AutoImageProcessor, processor_from_dict
from vit_common.images.timm import processor_from_timm

LONGEST = 1500
"""Most characters that a refusal may have, whatever it refuses."""


def deep(levels: int, kind: type = list) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2**31,
        2**63,
        10**400,
        -(10**400),
        0.0,
        0.5,
        1e-320,
        1e308,
    ),
    *(float("nan"), float("inf"), "", "0", "float32", "float32,int8", "cat" * 20_000, "\ud800"),
    *([], [[]], ["float32", 3], [["a", "b"]], [1, 2], [0.5] * 3, [None], list(range(30_000))),
    *({}, {"0": []}, {"0": "\udfff"}, {"a": 1}, {"height": 2**40, "width": 1}, {"0": ["n", "x"]}),
    *({"shortest_edge": 10**9}, deep(90), deep(950), deep(950, dict), {"0": deep(950)}),
]
odd = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)

CONFIGS = {
    name: {**cls().to_dict(), "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
    for name, cls in CONFIG_MAPPING.items()
}
# Everything that a class has is a name that a file may have.
CONFIG_KEYS = sorted(
    {key for table in CONFIGS.values() for key in table}
    | {key for cls in CONFIG_MAPPING.values() for key in dir(cls)}
    | {"torch_dtype", "num_labels", "_name_or_path", "name_or_path", "_commit_hash", "_ignored"}
    | {"attn_implementation", "_attn_implementation", "architecture", "vit_flax", "", "\ud800"}
    | {"pruned_heads", "rope_theta", "is_decoder", "torchscript", "return_unused_kwargs"}
)
PROCESSORS = [
    {**getattr(vit_torch, f"{name}ImageProcessor")(size=8).to_dict(), **more}
    for name in ("ViT", "DeiT", "Beit", "Bit")
    for more in ({}, {"do_center_crop": True, "crop_size": {"height": 6, "width": 6}})
]
PROCESSOR_KEYS = sorted(
    {key for table in PROCESSORS for key in table}
    | set(dir(vit_torch.BeitImageProcessor))
    | {"feature_extractor_type", "crop_rounding", "crop_pct", "do_pad", "image_processor", ""}
    | {"input_data_format", "data_format", "return_tensors", "do_reduce_labels", "a", "\ud800"}
)
TIMM = {
    "input_size": [3, 8, 8],
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_mode": "center",
}
slower = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def outcome(call: Any) -> Any:
    """What a call gives, or None where it refuses on purpose and in short."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of options that are ignored
            return call()
    except ViTError as refused:
        text = str(refused)
    assert len(text) < LONGEST, len(text)
    text.encode()
    return None


def mutated(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**copy.copy(table), **changes}


def use_config(table: dict[str, Any], path: Path) -> None:
    config = outcome(lambda: AutoConfig.from_dict(table))
    outcome(lambda: AutoConfig.from_dict(table, num_labels=3))
    outcome(lambda: ViTConfig.from_dict(table, return_unused_kwargs=True, extra=1))
    outcome(lambda: CONFIG_MAPPING["beit"](**{k: v for k, v in table.items() if k != "self"}))
    if config is None:
        return
    assert len(repr(config)) > 0
    assert config == copy.deepcopy(config)
    text = outcome(config.to_json_string)
    if text is not None:
        path.write_text(text)
        assert AutoConfig.from_pretrained(path) == config
    _ = (
        config.intermediate_size,
        config.drop_path_rates[:1],
        getattr(config, "grid_size", None),  # texts have none
        config.use_return_dict,
    )


@slower
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.dictionaries(st.sampled_from(CONFIG_KEYS), odd, min_size=1, max_size=3),
)
def test_configurations(tmp_path_factory, name, changes):
    use_config(mutated(CONFIGS[name], changes), tmp_path_factory.mktemp("c") / "config.json")


def use_processor(table: dict[str, Any]) -> None:
    processor = outcome(lambda: processor_from_dict(table, Path("preprocessor_config.json")))
    outcome(lambda: vit_torch.ViTImageProcessor.from_dict(table, size=4))
    if processor is None:
        return
    assert len(repr(processor)) > 0
    text = outcome(processor.to_json_string)
    with np.errstate(all="ignore"):
        result = outcome(lambda: processor(PIL.Image.new("RGB", (11, 9)), return_tensors="np"))
    if result is not None:
        assert result["pixel_values"].ndim == 4
    if text is not None:
        again = processor_from_dict(json.loads(text), Path("preprocessor_config.json"))
        assert again.to_json_string() == text


@slower
@given(
    st.sampled_from(PROCESSORS),
    st.dictionaries(st.sampled_from(PROCESSOR_KEYS), odd, min_size=1, max_size=3),
)
def test_processors(table, changes):
    use_processor(mutated(table, changes))


@slower
@given(st.dictionaries(st.sampled_from(sorted(TIMM)), odd, min_size=1, max_size=2))
def test_timm_transforms(changes):
    processor = outcome(lambda: processor_from_timm(mutated(TIMM, changes)))
    if processor is not None:
        with np.errstate(all="ignore"):
            outcome(lambda: processor(PIL.Image.new("RGB", (11, 9)), return_tensors="np"))


# -- one value in one place: what was found, and its neighbours


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_odd_value_in_every_field(name, tmp_path):
    path = tmp_path / "config.json"
    for key in (*CONFIG_MAPPING[name].fields, "num_labels", "torch_dtype", "model_type", "unknown"):
        for value in ODD:
            use_config({**CONFIGS[name], key: value}, path)


@pytest.mark.slow
@pytest.mark.parametrize("table", PROCESSORS[::2], ids=lambda t: t["image_processor_type"])
def test_every_odd_value_in_every_option(table):
    for key in {*table, "crop_rounding", "input_data_format", "unknown", "processor_class"}:
        for value in ODD:
            use_processor({**table, key: value})


def test_files(tmp_path):
    for key, text, match in (
        ("dtype", '["float32"]', r"`dtype` must be a floating dtype"),
        ("id2label", '{"0": ["a"], "1": ["b"]}', "`id2label` must be a mapping of class index to"),
        ("label2id", "[[1]]", "`label2id` must be a mapping"),
        ("label2id", '{"a": ' + "[" * 400 + "]" * 400 + "}", "nested at most 100 levels deep"),
        ("notes", "[" * 400 + "]" * 400, "`notes` must be nested at most 100 levels deep"),
        ("notes", "[" * 9000 + "]" * 9000, "config.json: not valid JSON|nested at most"),
        ("model_type", '["vit"]', "`model_type` must be"),
        ("hidden_size", "1" + "0" * 400, "`hidden_size` must be at most 2147483647"),
        ("mlp_ratio", "1e308", "`mlp_ratio` must be a number above 0"),
        ("hidden_act", '"' + "x" * 60_000 + '"', r"given 'xxx.*\(60000 characters\)"),
    ):
        family = "dinov2" if key == "mlp_ratio" else "vit"
        rest = f'"model_type": "{family}", ' if key != "model_type" else ""
        (tmp_path / "config.json").write_text(f'{{{rest}"{key}": {text}}}')
        with pytest.raises(ViTError, match=match) as caught:
            AutoConfig.from_pretrained(tmp_path)
        assert len(str(caught.value)) < LONGEST
    for key, text, match in (
        ("size", str(2**31), "`size` must be at most 65535 pixels per side; given 2147483648"),
        ("size", '{"height": 4294967296, "width": 8}', "`size` must be at most 65535"),
        ("crop_size", str(2**62), "`crop_size` must be at most 65535"),
        ("notes", "[" * 400 + "]" * 400, "`notes` must be nested at most 100 levels deep"),
        ("__dict__", "{}", "`__dict__` is an attribute of ViTImageProcessor, not an option"),
        ("_defaults", "{}", "`_defaults` is an attribute of ViTImageProcessor"),
        ("image_mean", "1" + "0" * 400, "`image_mean` must be a finite number"),
        ("image_std", "1e-60", "`image_std` must be free of zeros"),
        ("image_processor_type", "[1]", "must be one of ViTImageProcessor"),
        ("do_resize", json.dumps("x" * 60_000), r"given 'xxx.*\(60000 characters\)"),
    ):
        rest = '"image_processor_type": "ViTImageProcessor", ' if "_type" not in key else ""
        (tmp_path / "preprocessor_config.json").write_text(f'{{{rest}"{key}": {text}}}')
        with pytest.raises(ViTError, match=match) as caught:
            AutoImageProcessor.from_pretrained(tmp_path)
        assert len(str(caught.value)) < LONGEST


def test_a_resize_too_large_is_refused_before_it_is_made():
    processor = vit_torch.BitImageProcessor(size={"shortest_edge": 60_000}, do_center_crop=False)
    with pytest.raises(ViTError, match="the resize would make an image of 60000 x 120000 pixels"):
        processor(PIL.Image.new("RGB", (20, 10)))
    with pytest.raises(InputError, match="at most 65535"):
        processor.size = 10**6


def test_values_in_messages():
    assert shown("cat") == "'cat'"
    assert shown([1, {"a": 2}]) == "[1, {'a': 2}]"
    assert shown("x" * 1000) == f"{'x' * 100!r}... (1000 characters)"
    assert shown(b"x" * 1000) == f"{b'x' * 100!r}... (1000 bytes)"
    assert shown(deep(5000)) == "a value of type list"
    assert shown(10**5000) == "a value of type int"
    assert len(shown(list(range(10**5)))) < 150
    wanted = r"given \[0, 1, .* \(688890 characters\)"
    with pytest.raises(ConfigError, match=wanted) as caught:
        ViTConfig(hidden_act=list(range(10**5)))
    assert len(str(caught.value)) < 500
