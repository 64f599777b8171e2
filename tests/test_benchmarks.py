"""The benchmarks' own checks: what disagrees, is no number or is outside its bound ends them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("difference", [2e-4, np.inf, np.nan])
@pytest.mark.parametrize("first", [True, False])
def test_contenders_that_disagree_end_it(load, difference, first):
    common = load("common")
    common.require_agreement({"a": 0.0, "b": 1e-4}, 1e-4)
    differences = {"a": difference, "b": 0.0} if first else {"b": 0.0, "a": difference}
    with pytest.raises(SystemExit, match="the contenders disagree"):
        common.require_agreement(differences, 1e-4)


@pytest.mark.parametrize("passed", [True, False])
def test_a_row_outside_its_bound_fails(load, passed, tmp_path, monkeypatch):
    parity = load("parity")
    row = {
        "family": "vit",
        "device": "cpu",
        "platform": "cpu",
        "dtype": "float32",
        "precision": "highest",
        "stage": "logits",
        "max_abs": 1.0,
        "rule": "absolute",
        "value": 1.0,
        "bound": 0.5,
        "passed": passed,
        "transformers_float64": 0.0,
        "environment": {"versions": {}},
    }
    monkeypatch.setattr(parity, "measure", lambda *arguments: [row])
    monkeypatch.setattr(parity, "RESULTS", tmp_path)
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--families", "vit"])
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "parity.md"
    page.write_text(f"{parity.BEGIN}\n{parity.END}\n")
    if passed:
        parity.main()
    else:
        with pytest.raises(SystemExit, match="outside bounds: vit cpu float32"):
            parity.main()
    assert ("**outside**" in page.read_text()) is not passed
    assert len(json.loads((tmp_path / "parity.json").read_text())["rows"]) == 1
