"""Folders that Orbax writes (`PyTreeCheckpointer().save(folder, params)`), read by Orbax itself.

Names are the parts of a leaf's path joined by "/". Shapes and dtypes are in the folder's metadata;
the first array that is read restores all of them, since Orbax reads many arrays at once far faster
than one by one.

Format: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.errors import CheckpointError, MissingFileError, some
from vit_common.files.containers.tensor import DTYPES, Tensor
from vit_common.files.texts import reason

_METADATA = "_METADATA"
"""The file that says what is in a folder of Orbax; its presence tells one."""


def find(folder: Path) -> Path | None:
    """The folder of Orbax that a folder is, or that is the only one right in it; None if there is
    none.

    Raises:
        CheckpointError: there are several.
    """
    if (folder / _METADATA).is_file():
        return folder
    try:
        inside = sorted(path.parent for path in folder.glob(f"*/{_METADATA}"))
        inside = inside or sorted(path.parent for path in folder.glob(f"*/*/{_METADATA}"))
    except OSError:
        return None
    if len(inside) > 1:
        names = some([str(path.relative_to(folder)) for path in inside], 8)
        raise CheckpointError(f"{folder}: holds several Orbax checkpoints ({names}); name one.")
    return inside[0] if inside else None


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of Orbax.

    Raises:
        CheckpointError: Orbax is not installed, or does not read it.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: a folder written by Orbax, which is needed to read it: `pip install "
            "orbax-checkpoint`. Or write one file where it is installed: `params = "
            "orbax.checkpoint.PyTreeCheckpointer().restore(folder)`, then "
            '`open("model.msgpack", "wb").write(flax.serialization.to_bytes(params))`.'
        ) from error
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        found = checkpointer.metadata(folder.resolve())
        tree = getattr(getattr(found, "item_metadata", found), "tree", found)
        leaves = dict(_leaves(tree))
    except Exception as error:  # Orbax and its storage raise what they like
        raise CheckpointError(f"{folder}: Orbax cannot read it ({reason(error)}).") from error
    loaded: dict[str, np.ndarray] = {}
    lock = threading.Lock()

    def load(name: str) -> np.ndarray:
        with lock:
            if name not in loaded:
                loaded.update(_restore(ocp, checkpointer, folder, tree))
            return loaded.pop(name)

    tensors = {}
    for name, leaf in leaves.items():
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or str(dtype) not in DTYPES:
            continue
        tensors[name] = Tensor(name, tuple(shape), DTYPES[str(dtype)], partial(load, name))
    return tensors


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Name and metadata of every leaf; lists count theirs."""
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        yield "/".join(path), tree
        return
    for name, value in tree.items():
        yield from _leaves(value, (*path, str(name)))


def _restore(ocp: Any, checkpointer: Any, folder: Path, tree: Any) -> dict[str, np.ndarray]:
    def arguments(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: arguments(value) for name, value in part.items()}
        if isinstance(part, (list, tuple)):
            return [arguments(value) for value in part]
        return ocp.RestoreArgs(restore_type=np.ndarray)

    try:
        restored = checkpointer.restore(folder.resolve(), restore_args=arguments(tree))
    except Exception as error:  # as above
        raise MissingFileError(f"{folder}: Orbax cannot read it ({reason(error)}).") from error
    return {name: np.asarray(value) for name, value in _leaves(restored)}
