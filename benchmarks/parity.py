"""How far are the twins from each other, and from Transformers 4.57.6, at true sizes?

    python benchmarks/parity.py [--models tiny base digits]

Random weights (every parameter, none zero or one) scaled so that activations are of unit scale, or
the embedded checkpoint; random images; every stage of the base network. Writes
`results/parity.json` and the table in `docs/parity.md`.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from common import ROOT, write_result
from flax.traverse_util import unflatten_dict

from convert.formats import FORMATS
from convert.rules import to_foreign
from vit_common.checkpoint import open_checkpoint
from vit_common.config import ViTConfig
from vit_common.embedded import embedded_checkpoint
from vit_common.parameters import parameter_shapes
from vit_common.presets import preset
from vit_flax import FlaxViTForImageClassification
from vit_torch import ViTForImageClassification
from vit_torch.parity import compare, difference
from vit_torch.pretrained import to_numpy

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
ALL = {"output_hidden_states": True}


class InMemory:
    """An array as the converter wants to see it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self) -> np.ndarray:
        return self.array


def random_weights(config: ViTConfig) -> dict[str, np.ndarray]:
    """Every parameter random: dense weights by one over the root of their inputs."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in parameter_shapes(config, "classifier").items():
        value = rng.standard_normal(shape)
        if len(shape) in (2, 4):
            value /= np.sqrt(np.prod(shape[1:]))
        elif len(shape) == 1:
            value = 0.2 * value + float("layernorm" in name and name.endswith("weight"))
        weights[name] = value
    return weights


def network(name: str) -> tuple[ViTConfig, dict[str, np.ndarray]]:
    """A configuration and its weights, by the name of a preset or "digits"."""
    if name != "digits":
        config = preset(name, num_labels=1000)
        return config, random_weights(config)
    path = embedded_checkpoint()
    with open_checkpoint(path / "model.safetensors") as checkpoint:
        weights = {key: tensor.read() for key, tensor in checkpoint.items()}
    return ViTConfig.from_pretrained(path), weights


def flax_tree(weights: dict[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    """The weights as a Flax parameter tree."""
    mapped = to_foreign({n: InMemory(w) for n, w in weights.items()}, FORMATS["flax"]).tensors
    return unflatten_dict(
        {tuple(n.split("/")): jnp.asarray(t.read(), dtype) for n, t in mapped.items()}
    )


def load(model: torch.nn.Module, weights: dict[str, np.ndarray], dtype: torch.dtype) -> Any:
    """The model with these weights, in evaluation mode."""
    model = model.to(dtype).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


def largest(ours: Any, theirs: Any) -> float:
    """Largest difference over hidden states and logits of two outputs."""

    def array(value: Any) -> np.ndarray:
        return to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)

    pairs = [*zip(ours.hidden_states, theirs.hidden_states, strict=True)]
    pairs.append((ours.logits, theirs.logits))
    return max(difference("", array(a), array(b)).max_abs for a, b in pairs)


def measure(name: str, dtype: str) -> dict[str, Any]:
    """Differences of one network at one dtype."""
    config, weights = network(name)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, config.num_channels, *config.image_height_width))
    with jax.enable_x64(dtype == "float64"), torch.no_grad():
        x = x.astype("float64" if dtype == "float64" else "float32")
        kind = getattr(jnp, dtype)
        model = FlaxViTForImageClassification(
            config, dtype=kind, param_dtype=kind, precision="highest", _do_init=False
        )
        model._is_initialized = True
        model.params = flax_tree(weights, kind)
        torch_dtype = getattr(torch, dtype)
        twin = load(
            ViTForImageClassification(config, attn_implementation="eager"), weights, torch_dtype
        )
        report = compare(model, twin, x)
        reference_config = transformers.ViTConfig(**config.to_dict())
        # Transformers' eager attention takes the softmax in float32 whatever the dtype.
        reference_config._attn_implementation = "sdpa" if dtype == "float64" else "eager"
        reference = load(
            transformers.ViTForImageClassification(reference_config), weights, torch_dtype
        )
        flax_reference = transformers.FlaxViTForImageClassification(
            reference_config, dtype=kind, _do_init=False
        )
        ours = model(x, **ALL)
        want = reference(torch.tensor(x), **ALL)
        with jax.default_matmul_precision("highest"):
            flax_want = jax.jit(lambda p, x: flax_reference(x, params=p, **ALL))(model.params, x)
        return {
            "model": name,
            "dtype": dtype,
            "twins": report.largest.max_abs,
            "twins_stage": report.largest.name,
            "stages": len(report.stages),
            "scale": max(stage.scale for stage in report.stages),
            "flax_to_transformers_torch": largest(ours, want),
            "flax_to_transformers_flax": largest(ours, flax_want),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | dtype | twins | Flax to Transformers' PyTorch | Flax to Transformers' Flax "
        "| largest activation |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['dtype']} | {row['twins']:.1e} ({row['twins_stage']}) "
        f"| {row['flax_to_transformers_torch']:.1e} | {row['flax_to_transformers_flax']:.1e} "
        f"| {row['scale']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "base", "digits"])
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = [
        measure(name, dtype)
        for name in arguments.models
        for dtype in ("float64", "float32", "bfloat16")
    ]
    write_result("parity", {"question": __doc__.splitlines()[0], "rows": rows})
    page = ROOT / "docs" / "parity.md"
    text = page.read_text()
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{head}{BEGIN}\n{table(rows)}\n{tail}")
    print(table(rows))


if __name__ == "__main__":
    main()
