"""Sources for the tests of `vit convert`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from networks import InMemory, make_config, random_weights

from vit_cli.main import main
from vit_common.images.processor import ViTImageProcessor
from vit_convert.formats import table_for
from vit_convert.rules import to_foreign
from vit_convert.save import save_parameters


def make_source(place: Path, dtype=np.float32, config=None, head="classifier", scale=1.0) -> Path:
    """A directory as the Hub has it."""
    config = config or make_config(num_hidden_layers=1)
    weights = random_weights(config, head, **({} if head else {"add_pooling_layer": False}))
    tensors = {n: InMemory((w * scale).astype(dtype)) for n, w in weights.items()}
    save_parameters(place, config, tensors, architecture="ViTForImageClassification")
    return place


def timm_state(blocks: int = 2) -> dict[str, np.ndarray]:
    """A network by timm's names, as arrays."""
    config = make_config(num_hidden_layers=blocks)
    drawn = random_weights(config, "classifier")
    weights = {n: InMemory(w.astype(np.float32)) for n, w in drawn.items()}
    mapped = to_foreign(weights, table_for("timm", config))
    return {n: np.ascontiguousarray(t.read()) for n, t in mapped.tensors.items()}


@pytest.fixture(name="source")
def source_fixture(tmp_path):
    place = make_source(tmp_path / "source")
    ViTImageProcessor(size=32).save_pretrained(place)
    return place


@pytest.fixture(name="command")
def command_fixture(capsys, monkeypatch):
    """Run `vit ...` here: exit code, standard output, standard error."""
    monkeypatch.delenv("VIT_DEBUG", raising=False)

    def call(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "unexpected" not in err
        return code, out, err

    return call


def contents(place: Path) -> dict[str, bytes]:
    """Every file below a place."""
    return {
        str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()
    }


def rows(out: str) -> dict[str, str]:
    """The lines of a report by their first word; those of one name joined."""
    table: dict[str, str] = {}
    for line in out.splitlines():
        name, _, text = line.partition("  ")
        table[name] = (table.get(name, "") + "\n" + text.strip()).strip()
    return table


@pytest.fixture(name="nowhere")
def nowhere_fixture(tmp_path, monkeypatch):
    """A working directory in which a pickle that is run would leave something."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
