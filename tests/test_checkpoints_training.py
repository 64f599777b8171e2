"""Checkpoints of a training run: what is saved comes back to the bit, or is known to be damaged."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from vit_common.errors import CheckpointError, InputError, MissingFileError
from vit_flax.training.checkpoints import Checkpoints


class State(struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None
    key: jax.Array


def state_of(seed: int, width: int = 5) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "vit": {"kernel": jnp.asarray(rng.normal(size=(3, width)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=width), jnp.bfloat16),
        "odd": jnp.asarray([np.nan, -0.0, np.inf], jnp.float32),
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    return State(jnp.int32(seed), params, opt_state, None, jax.random.key(seed))


def bits(state: State) -> list[bytes]:
    plain = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]


def test_what_is_saved_comes_back_to_the_bit(tmp_path, caplog, capfd):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in range(1, 5):
        checkpoints.save(step, state_of(step), {"epoch": step / 2}, value=[0, 3, 9, 2, 1][step])
    checkpoints.close()
    (tmp_path / "c" / "5.orbax-checkpoint-tmp").mkdir()  # of a process that was killed
    again = Checkpoints(tmp_path / "c", keep=2)
    assert sorted(path.name for path in again.folder.iterdir()) == ["2", "3", "4"]
    assert again.steps == [2, 3, 4]  # the last two, and the best
    assert again.best_step == 2
    restored = again.restore(jax.eval_shape(lambda: state_of(0)))
    assert restored.step == 4
    assert restored.record == {"epoch": 2.0, "value": 1}
    assert bits(restored.state) == bits(state_of(4))
    assert jax.random.key_impl(restored.state.key) == jax.random.key_impl(jax.random.key(0))
    assert type(restored.state.opt_state[1][0]) is optax.ScaleByAdamState
    assert bits(again.restore(state_of(0), "best").state) == bits(state_of(2))
    again.forget_after(3)
    assert again.steps == [2, 3]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; the steps are 2, 3"):
        again.restore(state_of(0), 4)
    with pytest.raises(InputError, match=r"another run: opt_state/1/0/mu/half is bfloat16 \(5,\)"):
        again.restore(state_of(0, width=6))
    assert not caplog.records  # orbax's own log
    assert capfd.readouterr() == ("", "")


def flip(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 16
    file.write_bytes(content)


def arrays_in(folder: Path) -> list[Path]:
    """The files that hold most of a checkpoint's arrays."""
    return sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state_of(step, width=500), {})
    checkpoints.close()
    return folder


def copied(two_saves: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(two_saves, tmp_path / "c"))


@pytest.mark.parametrize("damage", ["flip", "record", "truncate", "gone"])
def test_a_damaged_checkpoint_is_passed_over(two_saves, tmp_path, damage):
    folder = copied(two_saves, tmp_path)
    biggest = arrays_in(folder / "2" / "state")[0]
    if damage == "flip":
        flip(biggest, 0.6)
    elif damage == "record":
        record = folder / "2" / "record" / "metadata"
        record.write_text(record.read_text().replace('"step": 2', '"step": 3'))
    elif damage == "truncate":
        biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    else:
        biggest.unlink()
    said: list[str] = []
    restored = Checkpoints(folder, say=said.append).restore(state_of(0, width=500))
    assert restored.step == 1
    assert bits(restored.state) == bits(state_of(1, width=500))
    assert len(said) == 1
    assert "\n" not in said[0]
    assert str(folder / "2") in said[0]
    assert "damaged" in said[0]


def test_nothing_to_restore(two_saves, tmp_path):
    folder = copied(two_saves, tmp_path)
    for step in "12":
        flip(arrays_in(folder / step / "state")[0], 0.5)
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        Checkpoints(folder).restore(state_of(0, width=500))


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1, width=5000), {})
    checkpoints.wait()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(MissingFileError, match=r"File too large\); step 1 is the last check"):
            checkpoints.save(2, state_of(2, width=5000), {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    assert bits(checkpoints.restore(state_of(0, width=5000)).state) == bits(state_of(1, width=5000))
    checkpoints.save(2, state_of(2, width=5000), {})
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(state_of(0, width=5000)).step == 2
