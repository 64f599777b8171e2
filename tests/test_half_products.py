"""Half precision on a CPU: which operands reach the products, and what is lost to float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_common.errors import InputError
from vit_flax.cpu import choose_half_products, half, half_products
from vit_flax.int8 import Dense


@pytest.mark.parametrize(("kind", "short"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_operands_of_products(kind, short):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 96)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((96, 32)), jnp.bfloat16)
    with half_products(kind):
        run = lambda k, x: Dense(32, use_bias=False, dtype=jnp.bfloat16).apply(  # noqa: E731
            {"params": {"kernel": k}}, x
        )
        compiled = jax.jit(run).lower(kernel, x).compile()
    text = compiled.as_text()
    operands = re.search(r"= f32\[64,32\]\S* dot\(%(\S+), %(\S+)\)", text)
    assert operands
    for name in operands.groups():
        assert re.search(rf"%{re.escape(name)} = {short}\[", text)
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    error = np.abs(np.asarray(compiled(kernel, x), np.float64) - wanted)
    assert np.all(error <= np.abs(wanted) * 2.0**-8 + 1e-4)  # one rounding to bfloat16


def test_choice_by_what_the_processor_reports(monkeypatch):
    for flags, kind in (({"avx512f"}, "float32"), ({"amx_bf16"}, "bfloat16"), (set(), "float32")):
        monkeypatch.setattr(half, "processor_flags", lambda flags=flags: frozenset(flags))
        assert choose_half_products().kind == kind
    with pytest.raises(InputError, match="'bfloat16' or 'float32'"), half_products("int4"):
        pass
