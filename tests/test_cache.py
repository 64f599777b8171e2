"""The compilation cache of the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit_cli import runtime
from vit_common.embedded import embedded_checkpoint


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/vit-flax/xla"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/x"}, "/x/vit-flax/xla"),
        ({"HOME": "/home/a", "VIT_COMPILATION_CACHE": "/mine"}, "/mine"),
        ({"HOME": "/home/a", "VIT_COMPILATION_CACHE": ""}, None),
        ({"VIT_COMPILATION_CACHE": "/mine", "JAX_COMPILATION_CACHE_DIR": "/jax"}, "/jax"),
    ],
)
def test_where_it_is(monkeypatch, environment, wanted):
    for name in (
        "HOME",
        "XDG_CACHE_HOME",
        "VIT_COMPILATION_CACHE",
        "JAX_COMPILATION_CACHE_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runtime.cache_directory() == (None if wanted is None else Path(wanted))


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    image = next(iter(sorted((embedded_checkpoint() / "images").iterdir())))
    environment = {**os.environ, "VIT_COMPILATION_CACHE": str(tmp_path / "xla")}
    environment |= {"JAX_LOG_COMPILES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "vit_cli", "predict", str(image)]
    kept = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kept.append({p.name for p in (tmp_path / "xla").iterdir() if p.name.endswith("-cache")})
    # What is kept has the hash of the program in its name: nothing new was compiled.
    assert kept[0] == kept[1]
    assert any(name.startswith("jit__run") for name in kept[0])


def test_a_home_that_cannot_be_written_is_no_fault(monkeypatch):
    monkeypatch.setenv("VIT_COMPILATION_CACHE", "/proc/no/such/place")
    runtime.enable_cache()
