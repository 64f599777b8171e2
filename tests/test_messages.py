"""What is said: faults on lines of their own, lines that break between words, and the model that is
used where none was named."""

from __future__ import annotations

import io
import json
import re
import sys
import textwrap

import PIL.Image
import pytest
import torch

from vit_cli.main import main
from vit_cli.options import Parser
from vit_cli.terminal.messages import say, show_warning
from vit_cli.terminal.results import print_titled
from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_common.errors import MissingFileError
from vit_flax.inference import ImageClassifier


def test_each_fault_has_a_line(capsys):
    say("error", "m.bin: 2 faults:\n- a  b: missing;\n- c\x1b[31m: missing")
    assert capsys.readouterr().err == (
        "vit: error: m.bin: 2 faults:\n  - a  b: missing\n  - c\\x1b[31m: missing\n"
    )


@pytest.mark.parametrize("name", ["a\nb.png", "a\n- b.png", "a\r\nvit: error: b"])
def test_line_breaks_in_names_are_escaped(name, capsys):
    say("error", f"{name}: not an image")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_warnings_have_lines_too(capsys):
    show_warning(UserWarning("two  faults:\n- a\n- b"), UserWarning, "x.py", 1)
    assert capsys.readouterr().err == "vit: warning: two faults:\n  - a\n  - b\n"


def test_the_faults_of_a_conversion(tmp_path, capsys):
    """One line for each, and no `\\n` to read over."""
    weights = torch.load(make_weights(tmp_path / "whole.pth"))
    for name in ("norm.bias", "blocks.0.norm1.weight"):
        del weights[name]
    torch.save(weights, tmp_path / "less.pth")
    options = ["--from", "timm", "--heads", "4", "--to", "hub"]
    assert main(["convert", str(tmp_path / "less.pth"), str(tmp_path / "o"), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "\\n" not in "".join(said)
    assert said[0].endswith("2 faults:")
    assert said.pop().startswith("  Nothing was written. ")
    assert [line[:4] for line in said[1:]] == ["  - "] * 2
    assert {re.search(r"[\w.]*layernorm\w*\.\w+", line)[0] for line in said[1:]} == {
        "layernorm.bias",
        "encoder.layer.0.layernorm_before.weight",
    }


def make_weights(path):
    assert main(["convert", str(embedded_checkpoint()), str(path), "--to", "timm"]) == 0
    return path


@pytest.mark.parametrize(
    ("mode", "side", "told"), [("RGB", 8, True), ("L", 300, True), ("L", 28, False)]
)
def test_the_network_of_digits_is_said_to_be_one(tmp_path, capsys, mode, side, told):
    """Where it answers about a photo; not where it is asked about digits."""
    image = tmp_path / "cat.png"
    PIL.Image.new(mode, (side, side)).save(image)
    assert main(["predict", str(image), "--json"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == told
    if told:
        assert said[0].startswith("vit: no --model was given, so the small network of handwritten")
    assert main(["predict", str(image), "--json", "--model", str(embedded_checkpoint())]) == 0
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_break_between_words_on_a_terminal(monkeypatch, capsys):
    text = "the names of these weights fit several formats " * 5
    monkeypatch.setenv("COLUMNS", "60")
    print_titled([("odd", text), ("", ""), ("path", "x" * 100)], 12)
    assert capsys.readouterr().out.splitlines() == [
        f"odd           {text.rstrip()}",
        "",
        f"path          {'x' * 100}",
    ]
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    print_titled([("odd", text)], 12)
    lines = out.getvalue().splitlines()
    assert [line[14:] for line in lines] == textwrap.wrap(text, 60 - 14)
    assert lines[0].startswith("odd  ")
    assert all(line.startswith(" " * 14) for line in lines[1:])


def test_out_of_memory_advises_an_option_that_there_is(monkeypatch, capsys):
    def fail(_):
        raise MemoryError

    for command, arguments, advice in (
        ("bench", [], "--batch-sizes"),
        ("verify", ["m"], "--batch"),
        ("inspect", ["m"], "model"),
    ):
        monkeypatch.setattr(f"vit_cli.commands.{command}.run", fail)
        assert main([command, *arguments]) == 2
        assert capsys.readouterr().err == f"vit: error: out of memory; try a smaller {advice}.\n"


def test_a_parser_knows_its_options():
    parser = Parser("vit x")
    parser.add_argument("--one")
    assert parser.has("--one")
    assert not parser.has("--two")


def test_weights_of_another_shape_have_lines_too(tmp_path, capsys):
    """The advice comes before them, on the line that says what is wrong."""
    folder = tmp_path / "a"
    assert main(["convert", str(embedded_checkpoint()), str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    image, output = str(embedded_images()[0]), str(tmp_path / "f.npz")
    assert main(["features", image, "--model", str(folder), "--output", output]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "\\n" not in "".join(said)
    assert "ignore_mismatched_sizes=True" in said[0]
    fault = r"  - \S+: found shape \(.*\) in the checkpoint and \(.*\) in the model"
    assert all(re.fullmatch(fault, line) for line in said[-5:-1])


def test_a_name_longer_than_any_path_is_not_repeated():
    classify = ImageClassifier.from_pretrained(embedded_checkpoint())
    with pytest.raises(MissingFileError, match="cannot be opened") as error:
        classify("x" * 60_000)
    assert len(str(error.value)) < 500
