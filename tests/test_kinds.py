"""What every kind of network can do: gradients, half precision, exports, several devices, kernels,
`vit verify` and `vit inspect`. That their numbers are those of timm and Transformers, the tests of
each kind show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from kinds import KINDS, config_of, kinds
from networks import flax_twin, images, random_weights, torch_twin
from tolerances import BOUNDS

import vit_flax.export
import vit_torch.export
from vit_cli.main import main
from vit_flax import FlaxViTForImageClassification
from vit_flax.attention import compiled_for
from vit_flax.params import canonical
from vit_flax.sharding import TRAINING_AXES, partition_spec
from vit_torch import ViTForImageClassification
from vit_torch.verify.gradients import flax_gradients, torch_gradients

HERE = Path(__file__).parent


def twins(kind: str, flax_dtype=jnp.float32, torch_dtype=torch.float32, **options: Any) -> Any:
    """The classifiers of a kind, with the same weights."""
    config = config_of(kind)
    weights = random_weights(config, "classifier")
    ours = flax_twin(FlaxViTForImageClassification, config, weights, flax_dtype, **options)
    return ours, torch_twin(ViTForImageClassification, config, weights, torch_dtype)


def logits_of(model: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(x)).logits.double().numpy()


@kinds("parallel")
def test_gradients_are_torchs(kind):
    config = config_of(kind, problem_type="single_label_classification")
    weights = random_weights(config, "classifier")
    x, labels = images(config, 3), np.array([0, 3, 4])
    with jax.enable_x64(True):
        ours = flax_twin(FlaxViTForImageClassification, config, weights, jnp.float64)
        found = flax_gradients(ours, x, {"labels": labels}, np.float64)
    theirs = torch_twin(ViTForImageClassification, config, weights, torch.float64)
    wanted = torch_gradients(theirs, x, {"labels": labels}, np.float64)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # A key's bias has no gradient but rounding: it adds the same to all scores of a query.
        scale = max(np.abs(gradient).max(), 1e-3)
        assert np.abs(found[name] - gradient).max() <= 1e-12 * scale, name


@kinds("shared relative MLP")
def test_half_precision_is_no_worse_than_torchs(kind):
    ours, low = twins(kind, jnp.bfloat16, torch.bfloat16, precision=None)
    x = images(ours.config, 8).astype(np.float32)
    exact = logits_of(twins(kind)[1], x)
    with torch.no_grad():
        theirs = low(torch.tensor(x).bfloat16()).logits.double().numpy()
    found = np.asarray(ours(x).logits, np.float64)

    def error(value):
        return np.sqrt(np.mean((value - exact) ** 2))

    assert error(found) <= 1.5 * error(theirs)


@kinds("differential")
def test_both_twins_draw_new_weights_alike(kind):
    """The mean and spread of each parameter, over all blocks and a few seeds."""
    config = config_of(kind, initializer_range=0.3, layer_scale_init_value=0.25)
    drawn: list[dict[str, list[np.ndarray]]] = [defaultdict(list), defaultdict(list)]
    for seed in range(4):
        torch.manual_seed(seed)
        theirs = ViTForImageClassification(config).state_dict()
        ours = canonical(FlaxViTForImageClassification(config, seed=seed).network_params).tensors
        for table, values in zip(
            drawn,
            (
                {name: tensor.read() for name, tensor in ours.items()},
                {name.removeprefix("vit."): value.numpy() for name, value in theirs.items()},
            ),
            strict=True,
        ):
            for name, value in values.items():
                table[re.sub(r"\.\d+\.", ".N.", name)].append(np.ravel(value))
    assert drawn[0].keys() == drawn[1].keys()
    for name in drawn[0]:
        flax, torchs = (np.concatenate(table[name]) for table in drawn)
        if torchs.std() == 0:
            np.testing.assert_array_equal(flax, torchs, err_msg=name)
            continue
        error = 5 / np.sqrt(2 * flax.size)  # five standard deviations of such an estimate
        assert abs(np.log(flax.std() / torchs.std())) <= 2 * error, name


@pytest.mark.slow
@kinds()
def test_a_program_of_jax_gives_the_same_numbers(kind, tmp_path):
    ours, twin = twins(kind)
    vit_flax.export.export(ours, tmp_path / "m", platforms=("cpu", "tpu"), check=False)
    x = images(ours.config, 3).astype(np.float32)
    found = vit_flax.export.load(tmp_path / "m")(x)
    np.testing.assert_allclose(found, logits_of(twin, x), atol=BOUNDS["twins float32"])


@pytest.mark.slow
@kinds()
def test_a_program_of_torch_gives_the_same_numbers(kind):
    ours, twin = twins(kind)
    x = images(ours.config, 3).astype(np.float32)
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    example = (torch.tensor(x[:2]),)
    program = torch.export.export(twin, example, dynamic_shapes=batch).module()
    with torch.no_grad():
        found = program(torch.tensor(x)).logits.numpy()
    np.testing.assert_allclose(found, np.asarray(ours(x).logits), atol=BOUNDS["twins float32"])


@pytest.mark.slow
@kinds()
def test_onnx_gives_the_same_numbers(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ours, twin = twins(kind)
    vit_torch.export.export(twin, tmp_path / "m.onnx", check=False)
    x = images(ours.config, 3).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": x})
    np.testing.assert_allclose(found, np.asarray(ours(x).logits), atol=BOUNDS["twins float32"])


def test_every_parameter_is_split_over_devices_as_something_says():
    for kind in KINDS:
        for scan in (False, True):
            model = FlaxViTForImageClassification(config_of(kind), _do_init=False, scan_layers=scan)
            for path in flatten_dict(model.params_shape_tree):
                partition_spec(path, TRAINING_AXES)


@pytest.mark.slow
def test_several_devices_give_the_same_numbers_and_gradients(tmp_path):
    """Of every kind, on two by two processors that XLA makes of one."""
    script = HERE / "kinds_on_devices.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == KINDS.keys()
    for kind, differences in found.items():
        assert max(differences.values()) <= 2e-6, (kind, differences)


WITHOUT_KERNEL = ("differential",)  # its values are twice as wide as its keys


@kinds("differential", "two branches")
def test_each_kind_gets_a_kernel_on_a_tpu(kind):
    """As many as it has attentions; and none of them, but JAX's own operations, on a CPU."""
    config = config_of(kind)
    model = FlaxViTForImageClassification(config, _do_init=False, dtype=jnp.bfloat16)
    pixels = jax.ShapeDtypeStruct((2, *config.image_height_width, config.num_channels), jnp.float32)

    def run(params, pixels):
        return model.module.apply({"params": params}, pixels).logits

    for platform, kernels in (("tpu", config.num_hidden_layers), ("cpu", 0)):
        with compiled_for(platform):
            traced = jax.jit(run).trace(model.params_shape_tree, pixels)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = len(re.findall(r"custom_call @tpu_custom_call", text))
        kernels = 0 if kind in WITHOUT_KERNEL else kernels
        assert found == kernels * config.num_parallel_branches


@pytest.mark.slow
@kinds()
def test_verify_and_inspect_know_it(kind, tmp_path, capsys):
    twins(kind)[1].save_pretrained(tmp_path / "model")
    assert main(["verify", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert main(["inspect", str(tmp_path / "model" / "model.safetensors"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "hub" in json.dumps(shown)
