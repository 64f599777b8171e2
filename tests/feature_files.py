"""The output of `vit features`, read by the libraries that users have."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors


def read_features(path):
    """features, files, failed, errors, made_with."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            assert set(arrays) == {"features", "files", "failed", "errors", "made_with"}
            lists = [arrays[name].tolist() for name in ("files", "failed", "errors")]
            return arrays["features"], *lists, json.loads(str(arrays["made_with"]))
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata()
            lists = [
                json.loads(metadata[name]) for name in ("files", "failed", "errors", "made_with")
            ]
            return file.get_tensor("features"), *lists
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = pq.read_table(path)
    rows = table.to_pylist()
    shape = json.loads(table.schema.metadata[b"shape"])
    found = [row for row in rows if row["features"] is not None]
    bad = [row for row in rows if row["features"] is None]
    assert [row["error"] for row in found] == [None] * len(found)
    dtype = table.schema.field("features").type.value_type.to_pandas_dtype()
    return (
        np.array([row["features"] for row in found], dtype).reshape(len(found), *shape),
        [row["file"] for row in found],
        [row["file"] for row in bad],
        [row["error"] for row in bad],
        json.loads(table.schema.metadata[b"made_with"]),
    )
