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


@pytest.mark.parametrize("missing", ["matrix products", "vit_flax"])
def test_a_contender_that_does_not_start(load, missing, monkeypatch):
    inference = load("inference")

    class Contender:
        def __init__(self, name, *arguments, **options):
            if name == missing:
                raise RuntimeError("out of memory")
            self.name, self.versions = name, {}

        def ask(self, line):
            return [[1.0]] if line.startswith("probabilities") else 1.0

        def close(self):
            pass

    written = []
    monkeypatch.setattr(inference, "Contender", Contender)
    monkeypatch.setattr(inference, "run_process", lambda command: None)
    monkeypatch.setattr(inference, "write_result", lambda name, result: written.append(result))
    options = ["--batches", "1", "--rounds", "1", "--only", "vit_flax"]
    monkeypatch.setattr(sys, "argv", ["inference.py", *options])
    if missing == "vit_flax":
        with pytest.raises(SystemExit, match="vit_flax failed: out of memory"):
            inference.main()
        assert written == []
    else:
        inference.main()
        assert written[0]["left_out"] == {missing: "out of memory"}


@pytest.fixture
def timed(load, monkeypatch):
    """Runs `inference.py` with contenders whose pass takes a second for each image."""
    inference = load("inference")
    started, written = [], []

    class Contender:
        def __init__(self, name, python, options, **others):
            self.name, self.dtype, self.versions = name, options[-1], {}
            started.append((name, self.dtype))

        def ask(self, line):
            off = {"float32": 0.0, "bfloat16": 1e-3, "int8": 1e-3}[self.dtype]
            return [[1.0 + off]] if line.startswith("probabilities") else float(line)

        def close(self):
            pass

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["inference.py", "--rounds", "1", *options])
        inference.main()
        return started, written[0]

    monkeypatch.setattr(inference, "Contender", Contender)
    monkeypatch.setattr(inference, "run_process", lambda command: None)
    monkeypatch.setattr(
        inference, "write_result", lambda name, result: written.append({**result, "name": name})
    )
    return run


def test_rows_of_each_dtype(timed):
    started, result = timed("--batches", "1", "--only", "ONNX Runtime", "OpenVINO")
    assert ("vit_flax", "int8") in started
    assert ("ONNX Runtime", "bfloat16") not in started
    ours = ["vit_flax", "vit_flax, bfloat16", "vit_flax, int8"]
    peers = ["ONNX Runtime", "OpenVINO", "OpenVINO, bfloat16"]
    assert [*result["largest_difference_of_a_probability"]] == ours + peers
    assert "vit_flax, int8 / vit_flax, bfloat16" in result["ratios"][1]
    assert result["name"] == "inference-base-cpu"


def test_what_takes_too_long_is_left_out_and_named(timed):
    options = ("--dtypes", "float32", "--only", "timm", "--patience", "3")
    _, result = timed("--batches", "1", "2", "4", *options)
    assert [*result["images_per_second"][2]] == ["vit_flax", "matrix products", "timm"]
    assert result["images_per_second"][4] == {}
    assert result["left_out"]["timm, batch 4"] == "a pass would take 4 s"


def test_a_machine_is_its_processor_instructions_and_cores(load, monkeypatch):
    common = load("common")
    monkeypatch.setattr(common, "processor", lambda: "Intel(R) Xeon(R) Processor")
    monkeypatch.setattr(common, "_flags", lambda: {"avx2", "avx512f", "avx512_vnni", "fma", "ht"})
    monkeypatch.setattr(common.os, "cpu_count", lambda: 2)
    assert common.machine() == "intel-xeon-avx512-vnni-2-cores"
    assert common.instruction_sets() == ["avx2", "avx512_vnni", "avx512f", "fma"]


def test_every_benchmark_is_run_by_all(load):
    """Every script that measures; `coverage` counts, and needs timm."""
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert {*load("all").BENCHMARKS} == scripts - {
        "all",
        "common",
        "contender",
        "coverage",
        "trainer",
    }


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        (
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz avx512",
            "intel-xeon-platinum-8481c-avx512",
        ),
        ("AMD EPYC 7B13 64-Core Processor avx2", "amd-epyc-7b13-64-core-avx2"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_kinds_of_machines(load, name, slug):
    assert load("common").slug(name) == slug


def test_one_kind_of_machine_never_overwrites_another(load, tmp_path, monkeypatch):
    common, parity = load("common"), load("parity")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    for each in ("avx2", "avx512"):
        monkeypatch.setattr(common, "instructions", lambda each=each: each)
        common.write_result("startup", {"seconds": each})
    found = {json.loads(path.read_text())["seconds"] for path in tmp_path.iterdir()}
    assert found == {"avx2", "avx512"}
    kind = {"family": "vit", "platform": "cpu", "dtype": "float32", "precision": "highest"}
    rows = [{**kind, "machine": each} for each in ("a", "b")]
    assert parity.merge(rows, [{**rows[1], "new": True}]) == [rows[0], {**rows[1], "new": True}]


@pytest.mark.parametrize("name", ["startup", "parity", "conversion", "inference", "scan", "tpu"])
def test_a_quick_try_is_an_option_of_each(load, name, monkeypatch, capsys):
    module = load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    assert "--quick" in capsys.readouterr().out
