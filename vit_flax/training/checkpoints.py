"""Checkpoints of a training run: orbax files with a digest of every array beside them.

orbax writes asynchronously, and a save counts only once it is complete, so a run may be killed at
any moment. It does not notice a bit that flips on the disk, though. Each save here therefore holds
the SHA-256 of every array, which is compared when it is read; a damaged checkpoint is passed over
for the last good one.

Arrays are read whole on the host and then placed as the run wants them, so that a run may go on
with other devices or another mesh.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from vit_common.errors import CheckpointError, InputError, MissingFileError, some
from vit_common.files.replace import make_directory
from vit_common.files.texts import reason
from vit_flax.sharding import lay_out

_STATE, _RECORD = "state", "record"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_THREADS = 4  # that compute digests
_SHOWN = 4  # names in a message


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives.

    Attributes:
        state: like the one given, with the arrays of the checkpoint.
        record: what `save` was given beside it.
        step: of the checkpoint.
    """

    state: Any
    record: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints in a folder: the last ones, and the best.

    Several processes share one folder, on a file system that all of them see; each makes the same
    calls in the same order.

    Args:
        folder: made if it is not there.
        keep: how many of the last are kept; the best one stays besides.
        best: whether the largest ("max") or the smallest ("min") `value` of `save` is the best;
            None knows no best.
        say: called with one line for each thing that a user should know.

    Raises:
        InputError: `keep` is no positive integer, or orbax is not installed.
        MissingFileError: the folder cannot be made or written.

    Example:
        >>> checkpoints = Checkpoints("run/checkpoints", keep=3)
        >>> checkpoints.save(100, state, {"epoch": 1})
        >>> state, record, step = checkpoints.restore(state)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        best: Literal["max", "min"] | None = "max",
        say: Callable[[str], object] | None = None,
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise InputError(f"`keep` must be a positive integer; given {keep!r}.")
        orbax = _orbax()
        self.folder = make_directory(folder).resolve()
        self._best = best
        self._say = say or (lambda line: None)
        self._saving: int | None = None
        if jax.process_index() == 0:  # what killed processes left
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        options = orbax.CheckpointManagerOptions(
            preservation_policy=_Keep(keep, self),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._args = orbax.args
        self._restore_as_numpy = orbax.RestoreArgs(restore_type=np.ndarray)
        try:
            self._manager = orbax.CheckpointManager(self.folder, options=options)
        except Exception as error:
            raise MissingFileError(f"{self.folder}: cannot be opened ({reason(error)}).") from error
        self._values: dict[int, float] = {}
        for step in self.steps:
            with contextlib.suppress(Exception):  # `restore` says what is wrong with it
                self._note(step, self.record(step).get("value"))

    # -- what there is

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if none has a value."""
        if not self._values or self._best is None:
            return None
        pick = max if self._best == "max" else min
        return pick(self._values, key=lambda step: (self._values[step], -step * self._sign))

    @property
    def _sign(self) -> int:
        return 1 if self._best == "max" else -1  # of equals, the first

    def _note(self, step: int, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self._values[step] = value

    def record(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state of a step, read without the arrays.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._read_record(step)[0]

    # -- writing

    def save(
        self,
        step: int,
        state: Any,
        record: Mapping[str, Any],
        *,
        value: float | None = None,
        wait: bool = False,
    ) -> None:
        """Save a state; the call returns once its arrays are copied, and writing goes on beside.

        Args:
            step: of the run. One that is there already is left as it is.
            state: a tree of arrays and random keys.
            record: what JSON can hold.
            value: how good it is; which of two is better is said by `best`.
            wait: return only when it is on the disk.

        Raises:
            MissingFileError: this save, or the one before, could not be written; those that were
                there stay.
        """
        self.wait()
        if step in self.steps:
            return
        arrays, keys = _as_arrays(state)
        body = {
            **record,
            "step": step,
            "value": value,
            "keys": keys,
            "digests": _everybodys(_digests(arrays)),
        }
        args = self._args.Composite(
            **{
                _STATE: self._args.PyTreeSave(_nested(arrays)),
                _RECORD: self._args.JsonSave({**body, "sha256": _digest_of_json(body)}),
            }
        )
        self._saving = step
        self._note(step, value)
        with self._failing(step):
            self._manager.save(step, args=args)
        if wait:
            self.wait()

    def rate(self, step: int, value: float | None) -> None:
        """Say how good a checkpoint is that was saved without a value. (This is not written down.)

        Args:
            step: of the checkpoint; another one is passed over.
            value: as `save` has it.
        """
        if step in self.steps:
            self._note(step, value)

    def wait(self) -> None:
        """Wait until what is being saved is on the disk.

        Raises:
            MissingFileError: it could not be written; the checkpoints before it stay.
        """
        if self._saving is not None:
            with self._failing(self._saving):
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
        self._saving = None

    def close(self) -> None:
        """Wait, and let the folder go.

        Raises:
            MissingFileError: as `wait`.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    def delete(self, step: int) -> None:
        """Delete the checkpoint of a step."""
        self.wait()
        self._manager.delete(step)
        self._values.pop(step, None)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a run that goes on from here writes them anew."""
        for later in self.steps:
            if later > step:
                self.delete(later)

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Errors of a save as one line; what it left is deleted."""
        try:
            yield
        except Exception as error:
            self._saving = None
            self._values.pop(step, None)
            if jax.process_index() == 0:
                for left in self.folder.glob(f"{step}.*tmp*"):
                    shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(Exception):
                self._manager.reload()
            good = [each for each in self.steps if each != step]
            stays = f"step {good[-1]} is the last checkpoint" if good else "there is no other one"
            raise MissingFileError(
                f"{self.folder / str(step)}: the checkpoint cannot be written ({_why(error)}); "
                f"{stays}."
            ) from error

    # -- reading

    def restore(self, like: Any, step: int | Literal["best", "last"] = "last") -> Restored:
        """Read a state.

        Args:
            like: a state of this run: a tree of arrays, keys, or their shapes; an array that has a
                sharding is placed by it.
            step: which; "last" takes the last one that is whole and says so if others are damaged.

        Raises:
            CheckpointError: there is none, or none that is whole.
            InputError: the checkpoint is of another run: other names, shapes or dtypes.
        """
        self.wait()
        if step == "last":
            for each in reversed(self.steps):
                try:
                    return self._restore(like, each)
                except CheckpointError as error:
                    self._say(f"{error} It is passed over.")
            raise CheckpointError(f"{self.folder}: holds no checkpoint that can be read.")
        chosen = self.best_step if step == "best" else step
        if chosen is None or chosen not in self.steps:
            what = "best checkpoint" if chosen is None else f"checkpoint of step {chosen}"
            listed = some(map(str, self.steps), _SHOWN)
            raise CheckpointError(f"{self.folder}: there is no {what}; the steps are {listed}.")
        return self._restore(like, chosen)

    def _read_record(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the user saved, and what was added to it."""
        place = self.folder / str(step)
        try:
            got = self._manager.restore(
                step, args=self._args.Composite(**{_RECORD: self._args.JsonRestore()})
            )[_RECORD]
            digest = got.pop("sha256")
            added = {name: got[name] for name in ("keys", "digests", "step")}
        except Exception as error:
            raise CheckpointError(
                f"{place}: this checkpoint is damaged ({_why(error)})."
            ) from error
        if digest != _digest_of_json(got):
            raise CheckpointError(
                f"{place}: this checkpoint is damaged (its record is not what was saved)."
            )
        return {name: each for name, each in got.items() if name not in added}, added

    def _restore(self, like: Any, step: int) -> Restored:
        place = self.folder / str(step)
        record, added = self._read_record(step)
        wanted, _ = _as_arrays(like, only_shapes=True)
        names = sorted({_name(entry) for entry in added["digests"]})
        missing = sorted(wanted.keys() - set(names))
        odd = sorted(set(names) - wanted.keys())
        if missing or odd:
            parts = [
                f"it {verb} {some(these, _SHOWN)}"
                for verb, these in (("lacks", missing), ("has besides", odd))
                if these
            ]
            raise InputError(f"{place}: a checkpoint of another run: {'; '.join(parts)}.")
        as_numpy = jax.tree.map(lambda _: self._restore_as_numpy, _nested(wanted))
        try:
            tree = self._manager.restore(
                step,
                args=self._args.Composite(
                    **{_STATE: self._args.PyTreeRestore(restore_args=as_numpy)}
                ),
            )[_STATE]
            arrays = {name: np.asarray(_at(tree, name)) for name in names}
        except Exception as error:
            raise CheckpointError(
                f"{place}: this checkpoint is damaged ({_why(error)})."
            ) from error
        damaged = _damaged(arrays, added["digests"])
        if damaged:
            raise CheckpointError(
                f"{place}: this checkpoint is damaged ({some(damaged, _SHOWN)}: not the values "
                "that were saved)."
            )
        for name, array in arrays.items():
            expected = wanted[name]
            if array.shape != expected.shape or array.dtype != expected.dtype:
                raise InputError(
                    f"{place}: a checkpoint of another run: {name} is {array.dtype} "
                    f"{array.shape} there; wanted {expected.dtype} {expected.shape}."
                )
        return Restored(_placed(like, arrays, added["keys"]), record, step)


class _Keep:
    """orbax's question which checkpoints stay: the last ones, and the best."""

    def __init__(self, count: int, checkpoints: Checkpoints) -> None:
        self._count, self._checkpoints = count, checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(each.step for each in checkpoints)
        kept = {*steps[-self._count :], self._checkpoints.best_step}
        return [each.step in kept for each in checkpoints]


# -- trees of arrays by names


def _as_arrays(state: Any, *, only_shapes: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a tree by name, and the kinds of those that are random keys; a key is held as
    its numbers."""
    arrays: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = "/".join(map(_part, path))
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys[name] = str(jax.random.key_impl(leaf)) if not only_shapes else ""
            data = jax.eval_shape(jax.random.key_data, leaf) if only_shapes else None
            arrays[name] = data if only_shapes else jax.random.key_data(leaf)
        else:
            arrays[name] = leaf
    return arrays, keys


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = array
    return tree


def _at(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree


def _placed(like: Any, arrays: Mapping[str, np.ndarray], keys: Mapping[str, str]) -> Any:
    """The arrays in the tree of `like`, each where the one in `like` lies."""

    def place(path: Any, leaf: Any) -> Any:
        name = "/".join(map(_part, path))
        array, sharding = arrays[name], getattr(leaf, "sharding", None)
        if name in keys:
            key = jax.random.wrap_key_data(jax.numpy.asarray(array), impl=keys[name])
            return key if sharding is None else lay_out(key, sharding)
        if sharding is None:
            return jax.numpy.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(place, like)


# -- digests: {"name@start:stop,...": SHA-256 in hexadecimal} of each part that a device holds


def _digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Of what this process holds; of parts that several devices hold, the first one's."""
    tasks: list[tuple[str, Any]] = []
    for name, array in arrays.items():
        if isinstance(array, jax.Array):
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    tasks.append((_entry(name, shard.index, array.shape), shard.data))
        elif jax.process_index() == 0:
            tasks.append((_entry(name, (), np.shape(array)), array))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(lambda task: (task[0], _digest(np.asarray(task[1]))), tasks))


def _entry(name: str, index: Sequence[slice], shape: Sequence[int]) -> str:
    spans = [each.indices(size)[:2] for each, size in zip(index, shape, strict=False)]
    spans += [(0, size) for size in shape[len(spans) :]]
    return f"{name}@{','.join(f'{start}:{stop}' for start, stop in spans)}"


def _name(entry: str) -> str:
    return entry.rpartition("@")[0]


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest_of_json(body: Mapping[str, Any]) -> str:
    # As it reads back: tuples are lists by then.
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(arrays: Mapping[str, np.ndarray], digests: Mapping[str, str]) -> list[str]:
    """Names of arrays that are not what they were when they were saved."""

    def check(item: tuple[str, str]) -> str | None:
        entry, digest = item
        name, _, spans = entry.rpartition("@")
        index = tuple(slice(*map(int, span.split(":"))) for span in spans.split(",") if span)
        return None if _digest(arrays[name][index]) == digest else name

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return sorted({name for name in pool.map(check, digests.items()) if name is not None})


def _everybodys(digests: dict[str, str]) -> dict[str, str]:
    """The digests of all processes together."""
    merged: dict[str, str] = {}
    for each in from_all(digests):
        merged.update(each)
    return merged


def from_all(value: Any) -> list[Any]:
    """A value of each process, in their order; all of them call this together.

    Args:
        value: of this process, as JSON can hold it.
    """
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(process_allgather(np.int32(len(text)))))
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(process_allgather(padded)).reshape(-1, longest)
    return [json.loads(row.tobytes()) for row in rows]


# -- orbax


def _orbax() -> Any:
    """orbax, whose own log says nothing: what matters is raised or said here."""
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise InputError(
            "checkpoints need Orbax; run: pip install orbax-checkpoint (the extra `train`)"
        ) from error
    from absl import logging as absl_logging

    logger = absl_logging.get_absl_logger()
    if _silence not in logger.filters:
        logger.addFilter(_silence)
    if getattr(sys.unraisablehook, "__name__", "") != _late_callbacks_pass.__name__:
        sys.unraisablehook = _late_callbacks_pass(sys.unraisablehook)
    return orbax


def _late_callbacks_pass(before: Callable[[Any], object]) -> Callable[[Any], object]:
    """What `sys.unraisablehook` is from now on: where one array cannot be read or written, orbax
    ends its event loop, and tensorstore reports each of the others to a loop that is closed."""

    def _late_callbacks_pass(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    return _late_callbacks_pass


def _silence(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _why(error: BaseException) -> str:
    """What went wrong, in a few words: orbax and tensorstore say it on many lines, or in the error
    that theirs came from."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    text = " ".join(map(str, chain))
    for one in chain:
        if isinstance(one, OSError) and one.errno in _FULL:
            return os.strerror(one.errno)
    for code in _FULL:
        if os.strerror(code) in text:
            return os.strerror(code)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (line or type(error).__name__)[:200]
