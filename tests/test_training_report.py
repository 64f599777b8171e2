"""The page of a training run or an evaluation: whole, by itself, and safe whatever names hold."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vit_cli.reports.charts import line_chart, thinned, ticks
from vit_cli.reports.report import report, worst, write_report
from vit_common.datasets import LabelledImages
from vit_common.metrics import measure
from vit_flax.training.evaluate import Evaluation

VOID = {"meta", "img", "br", "link", "input"}
NASTY = "<script>alert('1')</script> & \"co\""


class Page(HTMLParser):
    """The elements of a page; every one must be closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def found_of(K: int = 3, N: int = 12, names=None, broken=()):
    draws = np.random.default_rng(0)
    logits = draws.normal(size=(N, K)).astype(np.float32) * 3
    labels = np.arange(N) % K
    classes = tuple(names or (f"class {i}" for i in range(K)))
    metrics = measure(logits, labels, classes=classes)
    files = [f"photos/{i}.jpg" for i in range(N)]
    skipped = [(name, f"{name}: broken.") for name in broken]
    return Evaluation(logits, labels, files, np.arange(N), metrics, skipped, classes)


def pictures(N: int = 12):
    colours = [Image.new("RGB", (300, 200), (20 * i, 0, 0)) for i in range(N)]
    return LabelledImages(colours, np.arange(N) % 3, classes=("a", "b", "c"))


HISTORY = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "accuracy": 0.1, "learning_rate": 1e-4},
    {"step": 2, "epoch": 1.0, "loss": "nan", "accuracy": 0.2, "learning_rate": 2e-4},
    {"step": 2, "epoch": 1.0, "validation": {"top1": 0.5, "log_loss": 1.5, "f1": None}},
]


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    write_report(
        tmp_path / "r.html",
        title="pets",
        history=HISTORY,
        evaluation=found_of(broken=["x.jpg"]),
        dataset=pictures(),
        settings={"epochs": 10, "learning_rate": 3e-4},
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.seen:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    for words in ("Confusion matrix", "Calibration", "Worst mistakes", "x.jpg: broken.", "0.0003"):
        assert words in page.text, words
    for svg in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(svg)


def test_names_are_escaped_everywhere():
    found = found_of(names=(NASTY, "b", f"{NASTY} 2"), broken=[NASTY])
    found.names = [f"photos/{NASTY}\n" for _ in found.names]
    page = report(title=NASTY, evaluation=found, settings={NASTY: NASTY}, dataset=pictures())
    assert "<script" not in page
    assert NASTY in Page(page).text


def test_the_worst_mistakes_come_first_with_their_pictures():
    found = found_of()
    odds = np.exp(found.logits) / np.exp(found.logits).sum(1, keepdims=True)
    own = odds[np.arange(12), found.labels]
    wrong = np.flatnonzero(found.logits.argmax(1) != found.labels)
    want = wrong[np.argsort(own[wrong])]
    assert [i for i, _ in worst(found)] == want.tolist()

    page = report(title="t", evaluation=found, dataset=pictures())
    shown = re.findall(r"data:image/jpeg;base64,([^']*)", page)
    reds = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 0].mean() for data in shown
    ]
    np.testing.assert_allclose(reds, 20 * want, atol=3)


def test_a_picture_that_is_gone_is_left_out():
    data = LabelledImages(["gone.jpg"] * 12, np.arange(12) % 3, classes=("a", "b", "c"))
    assert "no picture" in report(title="t", evaluation=found_of(), dataset=data)


@pytest.mark.parametrize("K", [2, 30, 31, 300])
def test_any_number_of_classes(K):
    page = report(title="t", evaluation=found_of(K, 400))
    assert ("aria-label='Confusion matrix'" in page) == (K <= 30)
    assert len(page) < 1_000_000
    Page(page)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(problem):
    draws = np.random.default_rng(0)
    logits = draws.normal(size=(9, 2)).astype(np.float32)
    labels = (draws.random((9, 2)) > 0.5).astype(float)
    classes = None if problem == "regression" else ("a", "b")
    metrics = measure(logits, labels, problem, classes=classes)
    names = [f"{i}.jpg" for i in range(9)]
    found = Evaluation(logits, labels, names, np.arange(9), metrics, [], classes, problem)
    Page(report(title="t", evaluation=found))


def test_nothing_to_show_is_a_page_too():
    empty = found_of()
    empty.metrics, empty.names = {}, []
    for page in (report(title="t"), report(title="t", history=[], evaluation=empty)):
        Page(page)


def test_long_histories_are_thinned_and_keep_their_mean():
    points = [(float(i), float(i % 7)) for i in range(50_000)]
    few = thinned(points)
    assert len(few) <= 400
    assert np.mean([y for _, y in few]) == pytest.approx(3.0, abs=0.01)
    assert len(line_chart("t", {"loss": points})) < 20_000
    assert line_chart("t", {"loss": [(0.0, float("nan"))]}) == ""


@pytest.mark.parametrize("ends", [(0, 1), (0.3, 0.31), (-5, 1e6), (1e-9, 2e-9), (3, 3)])
def test_ticks_are_round_and_inside(ends):
    low, high = ends
    found = ticks(low, high)
    assert 1 <= len(found) <= 9
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
