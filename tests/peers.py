"""What the tests of conversions share: peers with every parameter at random, ours beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import vit_flax
import vit_torch

# Bounds on differences between logits, relative to the largest where that is over 1.
FLOAT64 = 1e-13
FLOAT32 = 2e-5
# timm resamples positions in float32, whatever the dtype.
RESIZED = 2e-5

NATIVE, LARGER, WIDE = (32, 32), (48, 48), (24, 56)


# -- weights and outputs


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter at random, none zero or one, and activations of unit scale."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = rng.normal(size=tuple(parameter.shape))
            if value.ndim in (2, 4) and name.endswith("weight"):
                value /= np.sqrt(np.prod(value.shape[1:]))
            elif "norm" in name and name.endswith("weight"):
                value = 1.0 + 0.2 * value
            elif name.endswith(("gamma", "gamma_1", "gamma_2", "lambda1", "lambda_1", "lambda_2")):
                value = 0.7 + 0.3 * value
            elif value.ndim == 1:
                value *= 0.2
            parameter.copy_(torch.tensor(value))
    return model.eval()


def pixels(size: tuple[int, int] = NATIVE, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(batch, 3, *size))


def run_peer(model: Any, x: np.ndarray) -> np.ndarray:
    """Logits of a model of timm, in the dtype of its parameters."""
    with torch.no_grad():
        return model(torch.tensor(x, dtype=next(model.parameters()).dtype)).double().numpy()


def run_torch(place: Path, x: np.ndarray, *, auto: str = "AutoModelForImageClassification", **kw):
    """Logits of our torch model, in float64."""
    model = getattr(vit_torch, auto).from_pretrained(place, dtype=torch.float64, **kw).eval()
    with torch.no_grad():
        out = model(torch.tensor(x), interpolate_pos_encoding=True)
    return (out.logits if "logits" in out else out.pooler_output).numpy()


def load_flax(place: Path, *, auto: str = "FlaxAutoModelForImageClassification", **kw):
    return getattr(vit_flax, auto).from_pretrained(place, precision="highest", **kw)


def run_flax(model: Any, x: np.ndarray) -> np.ndarray:
    """Logits of our Flax model, in float32."""
    out = model(jnp.asarray(x, jnp.float32), interpolate_pos_encoding=True)
    return np.asarray(out.logits if "logits" in out else out.pooler_output)


def assert_close(ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    assert np.abs(theirs).max() > 0.1  # of a scale that the bound is meant for
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * max(1.0, np.abs(theirs).max()))


def assert_same_model(a: Any, b: Any) -> None:
    """The same parameters to the bit, and the same configuration but for what names the file."""
    leaves, others = (jax.tree_util.tree_leaves_with_path(m.params) for m in (a, b))
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, x), (_, y) in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))
    tables = [m.config.to_dict() for m in (a, b)]
    for table in tables:
        for name in ("architectures", "dtype"):
            table.pop(name, None)
    assert tables[0] == tables[1]
