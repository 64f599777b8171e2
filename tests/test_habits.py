"""What users expect of any command and any library: completion, --quiet, NO_COLOR, exit codes that
are written down, one logger, and a model card with every model that is saved."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from networks import flax_twin, make_config, random_weights

import vit_torch
from vit_cli.main import _COMMANDS, main
from vit_cli.terminal import exit_codes
from vit_cli.terminal.messages import is_quiet, logged, quietly, say
from vit_cli.terminal.progress import Progress
from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_common.files.cards import ModelCard, rendered
from vit_flax import FlaxViTForImageClassification, FlaxViTModel
from vit_flax.inference import ImageClassifier

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier.from_pretrained(embedded_checkpoint())


@pytest.fixture
def loaded(classifier, monkeypatch):
    monkeypatch.setattr(ImageClassifier, "from_pretrained", lambda *_, **__: classifier)


# -- completion

ASKED = {
    "vit fea": ["features "],
    "vit predict --dt": ["--dtype "],
    "vit predict --dtype ": ["float32", "bfloat16", "float16"],
    "vit completion ": ["bash", "zsh", "fish"],
    "vit info --q": ["--quiet "],
    "vit inspect {here}/mo": ["{here}/model.bin "],
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`vit` on the path, as it is once installed; answers for completion in {here}."""
    script = tmp_path / "bin" / "vit"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vit_cli "$@"\n')
    script.chmod(0o755)
    (tmp_path / "model.bin").touch()
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def shell(*arguments, check=True):
    done = subprocess.run(arguments, capture_output=True, text=True, check=check, timeout=60)
    return done.stdout


@pytest.mark.parametrize(
    "lines",
    [["vit predict --dtype "], pytest.param([*ASKED], marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_bash_completes(command, lines):
    pytest.importorskip("argcomplete")
    script = 'eval "$(vit completion bash)"\nask() { COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9; '
    script += (
        'COMPREPLY=(); _python_argcomplete vit; IFS="|"; echo "${COMPREPLY[*]}"; unset IFS; }\n'
    )
    for line in lines:
        script += f'ask "{line.format(here=command)}"\n'
    wanted = ["|".join(ASKED[line]).format(here=command) for line in lines]
    assert shell("bash", "--norc", "-c", script).splitlines() == wanted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(command):
    script = (
        "vit completion fish | source; complete -C 'vit fea'; complete -C 'vit predict --dtype b'"
    )
    assert shell("fish", "--no-config", "-c", script).splitlines() == [
        f"features\t{_COMMANDS['features']}",
        "bfloat16\tcompute dtype (default: float32)",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_it(command):
    script = (
        'autoload -Uz compinit; compinit -u -D; eval "$(vit completion zsh)"; print $_comps[vit]'
    )
    assert shell("zsh", "-f", "-c", script) == "_python_argcomplete\n"


def test_completion_says_what_is_wrong(capsys, monkeypatch):
    assert main(["completion", "fsh"]) == 2
    assert (
        "no such shell: fsh (did you mean fish?); wanted bash, zsh, fish" in capsys.readouterr().err
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "argcomplete" else found(name)
    )
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "vit: error: completion needs argcomplete; run: pip install argcomplete.\n"
    )


# -- quiet, colours, exit codes


def test_quiet_leaves_warnings_and_errors(capsys):
    with quietly():
        say("a note")
        say("warning", "careful")
        say("error", "broken")
        assert is_quiet()
    say("another note")
    assert (
        capsys.readouterr().err == "vit: warning: careful\nvit: error: broken\nvit: another note\n"
    )


def test_quiet_of_commands(loaded, tmp_path, capsys):
    """The same output and exit code; no note. What cannot be read is still said."""
    images = list(map(str, embedded_images()[:2]))
    output = str(tmp_path / "out.jsonl")
    assert main(["predict", *images, "--output", output]) == 0
    assert capsys.readouterr().err == f"vit: wrote {output}: 2 images\n"
    before = Path(output).read_bytes()
    assert main(["predict", *images, "--output", output, "--force", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path(output).read_bytes() == before
    assert main(["predict", "-q", images[0], str(tmp_path / "none.png")]) == 1
    assert capsys.readouterr().err.startswith("vit: error: ")
    assert not is_quiet()


def test_quiet_shows_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with Progress(100) as bar:
        assert bar.shown
    with quietly(), Progress(100) as bar:
        assert not bar.shown


def test_no_color(classifier, monkeypatch):
    """https://no-color.org: with NO_COLOR set there is no escape sequence with a colour."""
    from vit_cli.terminal.results import Table

    def table(**environment):
        for name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        stream = io.StringIO()
        stream.isatty = lambda: True
        found = Table(stream, ["a.png"], ["7"])
        found.write("a.png", classifier(embedded_images()[0], top_k=2))
        found.flush()
        return stream.getvalue()

    coloured = re.compile(r"\x1b\[[\d;]*(3[0-8]|4[0-8]|9[0-7])[;m]")
    assert "\x1b[" in table()
    assert not coloured.search(table(NO_COLOR="1"))


def test_exit_codes_are_written_down(capsys):
    """Each in docs/cli.md and in `vit --help`, and no other in either."""
    codes = {value for value in vars(exit_codes).values() if isinstance(value, int)}
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page[page.index("## Exit codes") :]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.M)} == codes
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("exit codes:")[2]
    assert {int(code) for code in re.findall(r"^  (\d+) ", listed, re.M)} == codes


def test_every_command_has_its_line_in_the_docs():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    table = {
        line.split("`")[1].split()[1] for line in page.splitlines() if line.startswith("| `vit ")
    }
    assert table == {*_COMMANDS}


# -- the logger


def test_libraries_never_print_and_have_one_logger():
    printing, logging_ = [], []
    for package in ("vit_common", "convert", "vit_flax", "vit_torch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "onnx_program.py":  # the script that is put beside an export
                continue
            text = path.read_text(encoding="utf-8")
            if not re.search(r"print\(|getLogger|\bsys\.std", text):
                continue
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                if called in ("print", "sys.stdout.write", "sys.stderr.write"):
                    printing.append(place)
                if called == "logging.getLogger" and "torch.onnx" not in ast.unparse(node):
                    logging_.append(place.partition(":")[0])
    assert printing == []
    assert logging_ == ["vit_common/log.py"]


def test_the_logger(caplog, tmp_path):
    """Nothing unless it is asked for; then what was opened and compiled."""
    with caplog.at_level(logging.WARNING):
        ImageClassifier.from_pretrained(embedded_checkpoint())
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, logger="vit"):
        classify = ImageClassifier.from_pretrained(embedded_checkpoint())
        classify.engine.add("nothing", lambda params, pixels: (pixels[:, 0, 0],))
        classify.engine.compile("nothing", 1)
    opened, compiled = [record.getMessage() for record in caplog.records if record.name == "vit"]
    assert re.fullmatch(r"opened .*model\.safetensors: format \w+, family vit, \d+ tensors", opened)
    assert re.fullmatch(r"compiled nothing for 1 images at once in \d+\.\d s", compiled)


def test_the_command_shows_the_log_only_when_asked(capsys, monkeypatch):
    logger = logging.getLogger("vit")
    before = logger.level, logger.propagate, logger.handlers[:]
    for value, wanted in (("", ""), ("1", "vit: debug: compiled\n")):
        monkeypatch.setenv("VIT_DEBUG", value)
        with logged("vit"):
            logger.debug("compiled")
        assert capsys.readouterr().err == wanted
    assert (logger.level, logger.propagate, logger.handlers) == before


# -- model cards


def tiny(head="classifier", framework="flax", **options):
    config = make_config(**{"num_hidden_layers": 1, "num_labels": 3, **options})
    if framework == "torch":
        return vit_torch.ViTForImageClassification(config)
    cls = FlaxViTForImageClassification if head else FlaxViTModel
    return flax_twin(cls, config, random_weights(config, head))


@pytest.mark.parametrize("framework", ["flax", "torch"])
def test_a_saved_model_has_a_card(tmp_path, framework):
    """Read by huggingface_hub; its numbers are torch's, and its code runs."""
    labels = {0: "cat", 1: "a dog", 2: "no: 1"}
    model = tiny(framework=framework, id2label=labels)
    model.save_pretrained(tmp_path / "pets")
    card = huggingface_hub.ModelCard.load(tmp_path / "pets" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vitflax"],
    }
    twin = vit_torch.ViTForImageClassification.from_pretrained(tmp_path / "pets")
    count = sum(p.numel() for p in twin.parameters())
    for fact in (
        "# pets\n",
        "`ViTForImageClassification` of the family `vit`: 1 layers of hidden size 48, images of 32",
        f"- parameters: {count:,}\n",
        "- patches: 8 x 8 pixels\n",
        "- classes: 3: `cat`, `a dog`, `no: 1`\n",
    ):
        assert fact in card.text
    assert "loaded from" not in card.text
    names: dict = {}
    with contextlib.chdir(tmp_path):
        exec(re.findall(r"```python\n(.+?)```", card.text, re.S)[1], names)
    assert isinstance(names["model"], torch.nn.Module)


def test_a_card_says_where_the_weights_came_from(tmp_path):
    tiny().save_pretrained(tmp_path / "first")
    model = FlaxViTForImageClassification.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    text = (tmp_path / "second" / "README.md").read_text()
    assert "The weights were loaded from `first`; they may have been changed since." in text
    assert str(tmp_path) not in text
    assert "base_model" not in text
    model.config.name_or_path = "google/vit-base-patch16-224"
    model.save_pretrained(tmp_path / "third")
    card = huggingface_hub.ModelCard.load(tmp_path / "third" / "README.md")
    assert card.data.base_model == "google/vit-base-patch16-224"
    assert "`google/vit-base-patch16-224`" in card.text


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to(tmp_path / "nowhere")
    tiny().save_pretrained(tmp_path)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "value", ["no", "1.5", "a: b", "#x", "-", "null", "plain/name-1.0", "é\n'\""]
)
def test_front_matter_is_what_it_says(value):
    text = rendered(ModelCard({"license": value}, "text", tags=(value, "b")))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"license": value, "tags": [value, "b"]}
