"""README.md, docs/ and the notebook say what is so: everything they show is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documents import ROOT, Reader, agrees, blocks, pages

pytestmark = pytest.mark.docs


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_what_happens(page, tmp_path):
    found = "\n\n".join(Reader(tmp_path).faults(page))
    assert not found, "\n" + found


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.name)
def test_the_notebook_runs(path, tmp_path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    reader = Reader(tmp_path)
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        printed, failed = reader.execute("".join(cell["source"]))
        assert not failed, f"cell {number}:\n{failed}"
        shown = "".join(
            "".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout"
        )
        assert agrees(shown, printed) or not shown, f"cell {number}:\n{printed}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in _anchors(place), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_block_says_what_it_is():
    known = {"console", "python", "text", "json", "toml", "yaml", "bash", "mermaid"}
    odd = [
        f"{page.relative_to(ROOT)}:{block.line}: {block.kind!r}"
        for page in pages()
        for block in blocks(page)
        if block.kind not in known
    ]
    assert not odd, "\n".join(odd)


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        ("a  0.9139  3", "a 0.9140 3", True),
        ("a 0.91 3", "a 0.95 3", False),
        ("a\n...\nz", "a\nb\nc\nz\n", True),
        ("a\n...\nz", "a\nb\nc\n", False),
        ("took ... seconds", "took 3.1 seconds", True),
        ("took ... seconds", "took 3.1 minutes", False),
        ("a", "a\nb", False),
    ],
)
def test_outputs_are_compared(expected, given, same):
    assert agrees(expected, given) is same


def test_a_page_that_is_wrong_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ echo a\nb\n$ vit --version\nvit 99\n```\n\n"
        "```python\nprint(1 + 1)  # 3\n```\n"
        "<!-- online -->\n```console\n$ false\nx\n```\n"
    )
    monkeypatch.setattr("documents.ROOT", tmp_path)
    for name in ("vit_common", "examples", "benchmarks", "tests", "README.md", "docs"):
        (tmp_path / name).touch()
    folder = tmp_path / "work"
    folder.mkdir()
    assert len([*Reader(folder).faults(page)]) == 3


def test_every_recipe_has_a_row():
    """And every row is a recipe."""
    from vit_common.recipes import ALIASES, RECIPES

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)`(?: \(`(\w+)`\))? \|", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(RECIPES)
    assert {short: name for name, short in rows if short} == dict(ALIASES)
