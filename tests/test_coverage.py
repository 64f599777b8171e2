"""The count over timm's list of networks: it runs, says what is wrong, and its page is its file."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
from timm_models import timm

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "coverage.json"


@pytest.fixture
def coverage(monkeypatch):
    """The benchmark; the package that measures lines has the same name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_of_timm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_file(coverage):
    result = json.loads(RESULT.read_text())
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    _, rest = text.split(coverage._BEGIN)
    assert rest.split(coverage._END)[0] == coverage.page(result)


def test_what_is_counted():
    """Every name that timm has, none wrong, and a reason for each refusal."""
    result = json.loads(RESULT.read_text())
    rows = result["networks"]
    patterns = ("vit*", "deit*", "beit*", "flexivit*", "eva*", "naflexvit*", "samvit*")
    assert set(rows) == {name for pattern in patterns for name in timm.list_models(pattern)}
    found = Counter(row["outcome"] for row in rows.values())
    assert {name: found[name] for name in ("equal", "refused", "wrong", "crash", "not built")} == {
        name: count for name, count in result["counts"].items() if name != "networks"
    }
    assert found["wrong"] == found["crash"] == found["not built"] == 0
    for row in rows.values():
        if row["outcome"] == "equal":
            assert max(row["differences"].values()) <= result["bound"]
            assert set(row["differences"]) == {"torch", "flax"}
        else:
            assert row["reason"]


NAMES = {
    "samvit_base_patch16_224": "refused",
    "vit_small_patch16_dinov3_qkvb": "equal",
    "vit_large_patch16_sapiens2": "equal",
    "vit_base_patch16_rope_mixed_ape_224": "equal",
    "naflexvit_base_patch16_parfac_gap": "equal",
    "vit_dpwee_patch16_reg1_gap_256": "equal",
    "eva02_small_patch14_224": "equal",
    "vit_pe_core_tiny_patch16_384": "equal",
    "beit_base_patch16_224": "equal",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name(name, coverage, tmp_path):
    row = coverage.try_network(timm, name, tmp_path)
    assert row["outcome"] == NAMES[name], row


def test_a_network_that_differs_is_wrong(coverage, tmp_path, monkeypatch):
    build = coverage.build

    def other(timm, name):
        model = build(timm, name)
        save = timm.models.save_for_hf

        def changed(model, *arguments, **options):
            save(model, *arguments, **options)
            model.head.bias.data += 0.01  # what was saved is not what runs

        monkeypatch.setattr(timm.models, "save_for_hf", changed)
        return model

    monkeypatch.setattr(coverage, "build", other)
    row = coverage.try_network(timm, "vit_tiny_patch16_224", tmp_path)
    assert row["outcome"] == "wrong"
    assert "differs by" in row["reason"]
