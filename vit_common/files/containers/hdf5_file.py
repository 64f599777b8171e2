"""Keras's `.weights.h5`: arrays of an HDF5 file by their paths in it, read by h5py.

Links out of the file are not followed, and objects that are no arrays of numbers are left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vit_common.errors import CheckpointError
from vit_common.files.containers.tensor import DTYPES, DataFile, Index, Tensor
from vit_common.files.texts import reason

MAGIC = b"\x89HDF"


def read(file: DataFile) -> dict[str, Tensor]:
    """The tensors of the file, named by their paths.

    Raises:
        CheckpointError: h5py is not installed, or does not read it.
    """
    try:
        import h5py
    except ImportError as error:
        raise file.fail(
            "a TensorFlow or Keras file (HDF5), which h5py is needed to read: `pip install h5py`. "
            "Files of keras-hub's ViT (`.weights.h5`) can be read then."
        ) from error
    tensors: dict[str, Tensor] = {}

    def visit(name: str, found: Any) -> None:
        if not isinstance(found, h5py.Dataset):
            return
        if found.dtype.name not in DTYPES or found.shape is None:
            file.left_out[name] = f"is an array of {str(found.dtype)[:40]}, not of numbers"
            return
        shape = tuple(int(side) for side in found.shape)
        load = partial(_load, file, found, ())
        part = partial(_load, file, found)
        tensors[name] = Tensor(name, shape, DTYPES[found.dtype.name], load, load_part=part)

    try:
        opened = file.resources.enter_context(h5py.File(file.path, "r"))
        opened.visititems(visit)
    except Exception as error:  # h5py has no one class for a broken file
        raise file.fail(
            f"a TensorFlow or Keras file (HDF5) that h5py cannot read ({reason(error)})."
        ) from error
    return tensors


def _load(file: DataFile, dataset: Any, index: Index) -> np.ndarray:
    try:
        return np.asarray(dataset[index])
    except Exception as error:
        raise CheckpointError(f"{file.path}: h5py cannot read it ({reason(error)}).") from error
