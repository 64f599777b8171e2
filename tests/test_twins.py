"""The twins are the same text: what stands in both `model.py`, and in which order."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What one framework needs and the other has no word for.
ONLY = {
    "vit_flax": ["ViTLayerCollection"],  # PyTorch's `ModuleList`
    # What Transformers' PyTorch blocks return, and that undone.
    "vit_torch": ["with_probabilities", "without_tuple"],
}
SWITCHES = {"deterministic"}  # Flax is told what a PyTorch module knows: `training`
# What differs from block to block: an argument where one block is compiled for all.
RATES = {"ViTDropPath": {"rate"}, "ViTLayer": {"drop_path_rate", "share"}}
RATES |= dict.fromkeys(("ViTAttention", "ViTSelfAttention"), {"share"})


@functools.cache
def parts(package: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Classes and functions of `model.py` by the names that both twins give them."""
    tree = ast.parse((ROOT / package / "model.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return {node.name.removeprefix("Flax"): node for node in found}


def arguments(node: ast.ClassDef | ast.FunctionDef | None) -> set[str]:
    """Arguments of a function, or of the call of a class."""
    if isinstance(node, ast.ClassDef):
        calls = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        node = calls.get("__call__") or calls.get("forward")
    if node is None:
        return set()
    return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}


def test_classes_and_functions_stand_in_the_same_order():
    flax, torch = (
        [name for name in parts(package) if name not in ONLY[package]] for package in ONLY
    )
    assert flax == torch


CLASSES = {*parts("vit_torch")} - {"ViTDecoder"}  # that has no call in one of them


@pytest.mark.parametrize("name", sorted(name for name in CLASSES if name[0].isupper()))
def test_calls_take_the_same_arguments(name):
    flax, torch = (arguments(parts(package).get(name)) for package in ("vit_flax", "vit_torch"))
    assert flax - SWITCHES - RATES.get(name, set()) == torch
