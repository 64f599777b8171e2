"""Each container of weights, as its own library writes it and as nobody should."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch
from checkpoint_files import (
    DTYPES,
    _arrays,
    _assert_same,
    _dtype,
    _peak,
    _plain,
    _random,
    _torch_tensors,
    _tree,
)

from vit_common.errors import CheckpointError
from vit_common.files.checkpoint import (
    open_checkpoint,
    save_checkpoint,
)
from vit_common.files.containers import flax_msgpack

# -- safetensors


def test_safetensors_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    arrays = _arrays()
    (path,) = save_checkpoint(tmp_path, arrays, separator="/", metadata={"format": "pt"})
    expected = safetensors.numpy.save(
        {name: _plain(array) for name, array in arrays.items()}, metadata={"format": "pt"}
    )
    assert path.name == "model.safetensors"
    assert path.read_bytes() == expected


def test_safetensors_of_the_library_are_read(tmp_path: Path) -> None:
    arrays = {name: _plain(array) for name, array in _arrays().items()}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "b": "ü"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "safetensors"
        assert checkpoint.metadata == {"format": "pt", "b": "ü"}
        assert checkpoint.files == [path]
        assert "16" not in repr(checkpoint) or checkpoint.path == path
        _assert_same(checkpoint, arrays)


def test_safetensors_are_read_by_torch_and_flax(tmp_path: Path) -> None:
    arrays = _arrays(["float64", "float32", "float16", "bfloat16", "int64", "bool"])
    (path,) = save_checkpoint(tmp_path, arrays)
    for name, tensor in safetensors.torch.load_file(path).items():
        want = _plain(arrays[name.replace(".", "/")])
        assert tuple(tensor.shape) == want.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == want.tobytes()
    with jax.enable_x64(True):
        loaded = safetensors.flax.load_file(path)
    assert loaded["layer.bfloat16.w"].dtype == jnp.bfloat16
    for name, array in loaded.items():
        assert np.asarray(array).tobytes() == _plain(arrays[name.replace(".", "/")]).tobytes()


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    (path,) = save_checkpoint(tmp_path, {})
    assert path.read_bytes() == safetensors.numpy.save({})
    assert dict(open_checkpoint(path)) == {}
    # With metadata as well, version 0.8 of the library writes a header that is not JSON.
    (path,) = save_checkpoint(tmp_path, {}, metadata={"format": "flax"})
    assert open_checkpoint(path).metadata == {"format": "flax"}
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "flax"}


def test_an_unpadded_header_and_any_order_of_tensors_are_read(tmp_path: Path) -> None:
    header = b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},"a":' + (
        b'{"dtype":"U8","shape":[],"data_offsets":[0,1]},"__metadata__":null}'
    )
    path = tmp_path / "no_extension"
    numbers = np.array([1.5, -2.0], np.float32)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + numbers.tobytes())
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["a", "b"]
        assert checkpoint["a"].read() == 7
        np.testing.assert_array_equal(checkpoint["b"].read(), numbers)


def _safetensors(header: str | bytes | dict, data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def _entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "too short": (b"1234", "truncated: 4 bytes long"),
    "length over the limit": (b"\xff" * 7 + b"\x7f" + b"{}", "states a header of"),
    "length over the file": ((200).to_bytes(8, "little") + b"{}", "header of 200 bytes; the file"),
    "not an object": (_safetensors("[1]"), "does not begin with '{'"),
    "leading mark": (_safetensors("\ufeff{}"), "does not begin with '{'"),
    "leading tab of another kind": (_safetensors("\v{}"), "does not begin with '{'"),
    "metadata a list": (_safetensors({"__metadata__": []}), "map strings to strings"),
    "metadata a number": (_safetensors({"__metadata__": 0}), "map strings to strings"),
    "half a pair": (_safetensors('{"\\ud800":' + json.dumps(_entry()) + "}", b"1234"), "surrogate"),
    "not JSON": (_safetensors('{"a":'), "not valid safetensors header: .* line 1"),
    "not UTF-8": (_safetensors(b'{"\xff":1}'), "not UTF-8 at line 1"),
    "nested without end": (_safetensors('{"a":' * 100_000), "not valid safetensors header"),
    "number without end": (_safetensors('{"a":' + "9" * 5000 + "}"), "not valid"),
    "name twice": (
        _safetensors('{"a":1,"a":1}'),
        "the key 'a' twice",
    ),
    "field twice": (
        _safetensors('{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "the key 'dtype' twice",
    ),
    "entry not an object": (_safetensors({"a": 3}), "'a' must have exactly"),
    "field missing": (_safetensors({"a": {"dtype": "F32", "shape": [1]}}), "must have exactly"),
    "field unknown": (_safetensors({"a": {**_entry(), "stride": 2}}, b"1234"), "have exactly"),
    "dtype unknown": (_safetensors({"a": _entry("F31")}, b"1234"), "dtype 'F31' is not one of"),
    "dtype of half bytes": (_safetensors({"a": _entry("F4")}, b"1234"), "dtype 'F4' is not one"),
    "dtype not text": (_safetensors({"a": _entry(["F32"])}, b"1234"), "is not one of"),
    "shape negative": (_safetensors({"a": _entry(shape=[-1])}, b"1234"), "at least 0"),
    "shape of floats": (_safetensors({"a": _entry(shape=[1.0])}, b"1234"), "list of integers"),
    "shape of booleans": (_safetensors({"a": _entry(shape=[True])}, b"1234"), "of integers"),
    "shape not a list": (_safetensors({"a": _entry(shape=1)}, b"1234"), "list of integers"),
    "shape of many axes": (_safetensors({"a": _entry(shape=[1] * 99)}, b"1234"), "at most 32"),
    "shape overflows": (_safetensors({"a": _entry(shape=[2**62, 2])}, b"1234"), "any memory"),
    "shape overflows to 0": (_safetensors({"a": _entry(shape=[2**62, 4, 0])}), "any memory"),
    "shape against offsets": (_safetensors({"a": _entry(shape=[2])}, b"1234"), "takes 8 bytes"),
    "offsets reversed": (_safetensors({"a": _entry(offsets=[4, 0])}, b"1234"), "takes 4 bytes"),
    "offsets of three": (_safetensors({"a": _entry(offsets=[0, 4, 8])}, b"1234"), "begin, end"),
    "truncated": (_safetensors({"a": _entry()}, b"123"), "truncated: .* 4 bytes; there are 3"),
    "trailing": (_safetensors({"a": _entry()}, b"12345"), "more bytes than its header"),
    "gap": (_safetensors({"a": _entry(offsets=[1, 5])}, b"12345"), "'a' leaves a gap"),
    "overlap": (
        _safetensors({"a": _entry(), "b": _entry(offsets=[2, 6])}, b"123456"),
        "'b' overlaps",
    ),
    "metadata of numbers": (_safetensors({"__metadata__": {"a": 1}}), "map strings to strings"),
    "metadata not a map": (_safetensors({"__metadata__": ["a"]}), "map strings to strings"),
    "claims a terabyte": (
        _safetensors({"a": _entry(shape=[2**38], offsets=[0, 2**40])}, b"1234"),
        "truncated: the tensors take 1099511627776 bytes; there are 4",
    ),
}


@pytest.mark.parametrize(
    "header",
    [" {}", "\n\t\r {}", " " * 100 + "{}", '{"__metadata__":null}', "{} \n", "\t{} "],
)
def test_white_space_around_a_header_is_read_as_the_library_does(tmp_path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_safetensors(header))
    assert safetensors.numpy.load(path.read_bytes()) == {}
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 0


PIECES = (
    *(" ", "\t", "\n", "\r", "\v", "\f", "\ufeff", "\0", "{", "}", "[", "]", '"', ",", ":"),
    *("null", "-0", "1e0", "0.0", "NaN", "99999999999999999999", "01", "+1"),
    *("\\u0041", "\\ud800", "\\ud83d\\ude00"),
    *('"__metadata__":', '"__metadata__":null,', '"__metadata__":[],', '"__metadata__":{"a":1},'),
)


def test_no_safetensors_header_is_read_that_the_library_refuses(tmp_path) -> None:
    rng = random.Random(0)
    path = tmp_path / "model.safetensors"
    read = 0
    for _ in range(400):
        header = {"a": _entry()} | ({"b": _entry("U8", [2], [4, 6])} if rng.random() < 0.3 else {})
        text = json.dumps(header)
        for _ in range(rng.randrange(3)):
            at = rng.choice([0, 1, len(text), len(text) - 1, rng.randrange(len(text))])
            text = text[:at] + rng.choice(PIECES) + text[at + rng.choice([0, 0, 1]) :]
        path.write_bytes(_safetensors(text, bytes(6 if "b" in header else 4)))
        try:
            open_checkpoint(path).close()
        except CheckpointError:
            continue
        safetensors.deserialize(path.read_bytes())
        read += 1
    assert read > 80


@pytest.mark.parametrize("size", [4 * 10**9, 10 * 10**9, 100 * 10**9])
def test_large_files_are_read(tmp_path, size: int) -> None:
    """Two tensors, of which the second begins and ends beyond what 31 and 32 bits can say."""
    path = tmp_path / "model.safetensors"
    header = {"a": _entry("U8", [size], [0, size]), "b": _entry("F32", [2], [size, size + 8])}
    text = _safetensors(header)
    with path.open("wb") as stream:
        stream.write(text)
        stream.truncate(len(text) + size + 8)  # a file of holes
        stream.seek(len(text) + size)
        stream.write(np.array([1, 2], "<f4").tobytes())
    with open_checkpoint(path) as checkpoint, safetensors.safe_open(path, "numpy") as peer:
        assert checkpoint["a"].shape == (size,)
        np.testing.assert_array_equal(checkpoint["b"].read(), peer.get_tensor("b"))
        assert checkpoint["a"].read_part((slice(size - 4, size),)).tolist() == [0] * 4


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_safetensors_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    def refused() -> None:
        with pytest.raises(CheckpointError, match=message) as info:
            open_checkpoint(path)
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)

    assert _peak(refused) < 4_000_000


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((150_000_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 200_000_000)  # sparse: takes no room

    def refused() -> None:
        with pytest.raises(
            CheckpointError, match=r"header of 150000000 bytes.* limit is 100000000"
        ):
            open_checkpoint(path)

    assert _peak(refused) < 1_000_000


def test_a_boolean_that_is_no_boolean_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_safetensors({"a": _entry("BOOL", [2], [0, 2])}, b"\x01\x02"))
    with pytest.raises(CheckpointError, match="bytes other than 0 and 1"):
        open_checkpoint(path)["a"].read()


def test_loading_takes_one_copy_and_one_tensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"w{i:02}": rng.standard_normal((512, 256)).astype(np.float32) for i in range(16)}
    (path,) = save_checkpoint(tmp_path, arrays)
    size, largest = path.stat().st_size, arrays["w00"].nbytes
    loaded: list[np.ndarray] = []

    def load() -> None:
        with open_checkpoint(path) as checkpoint:
            loaded.extend(np.ascontiguousarray(tensor.read().T) for tensor in checkpoint.values())

    assert _peak(load) < size + 1.5 * largest
    np.testing.assert_array_equal(loaded[3], arrays["w03"].T)
    assert _peak(lambda: open_checkpoint(path)) < largest / 4


def test_arrays_are_aligned_writeable_and_outlive_the_file(tmp_path: Path) -> None:
    (path,) = save_checkpoint(tmp_path, {"a": np.arange(5, dtype=np.uint8), "b": np.ones(3)})
    tensors = dict(open_checkpoint(path))  # the checkpoint itself is gone now
    array = tensors["a"].read()
    with path.open("r+b") as stream:  # what another program does that saves in place
        stream.truncate(0)
    array += 1
    np.testing.assert_array_equal(array, [1, 2, 3, 4, 5])
    assert array.ctypes.data % 64 == 0
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was truncated"):
        tensors["b"].read()


def test_a_closed_checkpoint_says_so(tmp_path: Path) -> None:
    (path,) = save_checkpoint(tmp_path, {"a": np.ones(2)})
    with open_checkpoint(path) as checkpoint:
        pass
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint["a"].read()
    with pytest.raises(KeyError):
        checkpoint["b"]


def test_tensors_can_be_read_from_many_threads(tmp_path: Path) -> None:
    arrays = {f"{i}": np.full((300, 100), i) for i in range(40)}
    (path,) = save_checkpoint(tmp_path, arrays)
    wrong: list[str] = []
    with open_checkpoint(path) as checkpoint:

        def read(names: list[str]) -> None:
            wrong.extend(n for n in names if not (checkpoint[n].read() == int(n)).all())

        threads = [threading.Thread(target=read, args=(list(arrays)[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# -- Flax msgpack


def test_msgpack_bytes_are_those_of_flax(tmp_path: Path) -> None:
    arrays = _arrays() | {f"deep/{'x/' * 20}{i}": np.full(i, i, np.uint8) for i in range(20)}
    arrays |= {"long": np.zeros(70_000, np.int8), "middle": np.zeros(300, np.int8)}
    (path,) = save_checkpoint(tmp_path, arrays, container="msgpack", stem="flax_model")
    assert path.name == "flax_model.msgpack"
    assert path.read_bytes() == flax.serialization.to_bytes(_tree(arrays))
    restored = flax.serialization.msgpack_restore(path.read_bytes())
    for name, array in flax.traverse_util.flatten_dict(restored, sep="/").items():
        assert array.tobytes() == _plain(arrays[name]).tobytes()


def test_msgpack_of_flax_is_read(tmp_path: Path) -> None:
    arrays = _arrays([*DTYPES, "complex128"])
    path = tmp_path / "x"
    path.write_bytes(flax.serialization.to_bytes(_tree(arrays)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "msgpack"
        assert checkpoint.metadata == {}
        _assert_same(checkpoint, arrays)


def test_msgpack_scalars_lists_and_empty_subtrees(tmp_path: Path) -> None:
    numbers = {"int": 3, "minus": -5, "big": 2**40, "low": -(2**40), "huge": 2**64 - 1}
    numbers |= {"float": 0.1, "yes": True, "complex": 1 + 2j, "numpy": np.float16(1.5)}
    arrays = {"list": [np.ones(2), np.zeros(3)], "jax": jnp.ones(2)}
    tree = numbers | arrays | {"none": None, "nothing": {}}
    path = tmp_path / "state.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    with open_checkpoint(path) as checkpoint:
        values = {name: tensor.read() for name, tensor in checkpoint.items()}
    assert {*values} == {*numbers, "list/0", "list/1", "jax"}
    for name, number in numbers.items():
        assert values[name].shape == ()
        assert values[name] == number
    np.testing.assert_array_equal(values["list/1"], np.zeros(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "complex64"])
def test_msgpack_splits_large_arrays_as_flax_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 48)
    monkeypatch.setattr(flax_msgpack, "MAX_CHUNK_SIZE", 48)
    rng = np.random.default_rng(0)
    arrays = {"a/b": _random(rng, (7, 11), dtype), "c": _random(rng, (3,), dtype)}
    arrays["as_large_as_allowed"] = _random(rng, (48 // _dtype(dtype).itemsize,), dtype)
    (path,) = save_checkpoint(tmp_path, arrays, container="msgpack")
    assert path.read_bytes() == flax.serialization.to_bytes(_tree(arrays))
    with open_checkpoint(path) as checkpoint:
        _assert_same(checkpoint, arrays)


def _pack(value: object) -> bytes:
    return msgpack.packb(value, use_bin_type=True)


def _array(shape: object = (2,), dtype: object = "uint8", data: object = b"12") -> msgpack.ExtType:
    return msgpack.ExtType(1, _pack((shape, dtype, data)))


def _pieces(shape: object, chunks: object, **extra: object) -> dict:
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks, **extra}


def _nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\x80"


MSGPACKS = {
    "not a map": (b"\x01", "holds a map; this one holds a number"),
    "list": (_pack([1]), "holds a map; this one holds a array"),
    "trailing": (_pack({"a": _array()}) + b"\x00", "1 bytes after the end"),
    "truncated": (_pack({"a": _array()})[:-1], "does not fit"),
    "key twice": (b"\x82" + _pack("a") + b"\x01" + _pack("a") + b"\x01", "'a' twice"),
    "name twice": (_pack({"a": {"b": 1}, "a/b": 2}), "both named 'a/b'"),
    "key a number": (_pack({1: 2}), "key at byte 1 must be a string"),
    "key bytes": (_pack({b"a": 2}), "key at byte 1 must be a string"),
    "key not UTF-8": (b"\x81\xa1\xff\x01", "key at byte 1 must be a string"),
    "key long": (_pack({"a" * 2000: 1}), "at most 1024"),
    "name long": (_pack({"a" * 600: {"b" * 600: 1}}), "longer than 1024"),
    "text": (_pack({"a": "text"}), "'a' at byte 1 must be an array or a map; it is a str"),
    "list inside": (_pack({"a": [1]}), "must be an array or a map; it is a array"),
    "unused byte": (b"\x81\xa1a\xc1", "byte 3 is 0xc1"),
    "unknown extension": (_pack({"a": msgpack.ExtType(9, b"x")}), "extension type 9"),
    "timestamp": (_pack({"a": msgpack.Timestamp(1)}), "extension type 255"),
    "array of two": (_pack({"a": msgpack.ExtType(1, _pack(((2,), "uint8")))}), "packed as"),
    "array with more": (_pack({"a": msgpack.ExtType(1, _array().data + b"x")}), "1 bytes too"),
    "shape a number": (_pack({"a": _array(2)}), "its shape must be a list"),
    "shape of texts": (_pack({"a": _array(("", ""))}), "list of integers"),
    "shape of maps": (_pack({"a": _array(({}, 2), data=b"")}), "list of integers"),
    "shape negative": (_pack({"a": _array((-2, -1))}), "at least 0"),
    "shape of many axes": (_pack({"a": _array((1,) * 40)}), "at most 32"),
    "shape huge": (_pack({"a": _array((2**40, 2**40))}), "any memory"),
    "shape against data": (_pack({"a": _array((3,))}), "takes 3 bytes; given bin 2"),
    "data too long": (_pack({"a": _array((1,))}), "takes 1 bytes; given bin 2"),
    "dtype unknown": (_pack({"a": _array(dtype="object")}), "dtype 'object' is not one of"),
    "dtype void": (_pack({"a": _array(dtype="V1")}), "dtype 'V1' is not one of"),
    "dtype a number": (_pack({"a": _array(dtype=3)}), "dtype None is not one of"),
    "complex of one": (_pack({"a": msgpack.ExtType(2, _pack((1.0,)))}), "wanted at byte"),
    "complex of texts": (_pack({"a": msgpack.ExtType(2, _pack(("", "")))}), "pair of numbers"),
    "claims 4 GiB of array": (b"\x81\xa1a\xc9" + b"\xff" * 4 + b"\x01", "ext of length 4294967295"),
    "claims 4 G entries": (b"\xdf" + b"\xff" * 4, "map of length 4294967295"),
    "claims a long key": (b"\x81\xdb" + b"\xff" * 4, "str of length 4294967295"),
    "claims axes": (_pack({"a": msgpack.ExtType(1, b"\x93\xdd" + b"\xff" * 4)}), "of length 4294"),
    "nested": (_nested(200), "nested more than 64"),
    "nested without end": (_nested(100_000), "nested more than 64"),
    "pieces too few": (_pack({"a": _pieces({"0": 3}, {"0": _array()})}), "1 chunks do not make"),
    "pieces of two dtypes": (
        _pack({"a": _pieces({"0": 4}, {"0": _array(), "1": _array(dtype="int8")})}),
        "2 chunks do not make",
    ),
    "pieces misnumbered": (_pack({"a": _pieces({"0": 2}, {"1": _array()})}), "numbered chunks"),
    "pieces with more": (_pack({"a": _pieces({"0": 2}, {"0": _array()}, x=1)}), "must have"),
    "pieces missing": (_pack({"a": {"__msgpack_chunked_array__": True}}), "must have a shape"),
    "pieces not arrays": (_pack({"a": _pieces({"0": 2}, {"0": 3})}), "numbered chunks"),
    "pieces of a huge shape": (_pack({"a": _pieces({"0": 2**63}, {"0": _array()})}), "any memory"),
}


@pytest.mark.parametrize("case", MSGPACKS)
def test_a_bad_msgpack_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = MSGPACKS[case]
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(data)

    def refused() -> None:
        with pytest.raises(CheckpointError, match=message) as info:
            open_checkpoint(path)
        assert str(path) in str(info.value)

    assert _peak(refused) < 4_000_000


def test_msgpack_with_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax_msgpack, "MAX_ENTRIES", 3)
    (path,) = save_checkpoint(tmp_path, {"a/b": np.ones(1), "a/c": np.ones(1)}, container="msgpack")
    assert len(open_checkpoint(path)) == 2
    (path,) = save_checkpoint(
        tmp_path, {"a/b": np.ones(1), "a/c": np.ones(1), "d": np.ones(1)}, container="msgpack"
    )
    with pytest.raises(CheckpointError, match="more than 3 entries"):
        open_checkpoint(path)


def test_msgpack_is_indexed_without_being_loaded(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.zeros(1_000_000, np.uint8) for i in range(8)}
    (path,) = save_checkpoint(tmp_path, arrays, container="msgpack")
    assert _peak(lambda: open_checkpoint(path)) < 100_000


# -- numpy


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_of_numpy_is_read(tmp_path: Path, compressed: bool) -> None:
    native = [name for name in DTYPES if _dtype(name).isbuiltin == 1]
    arrays = _arrays([*native, "complex128"])
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "npz"
        _assert_same(checkpoint, arrays)


def test_bfloat16_in_npz_comes_back(tmp_path: Path) -> None:
    array = np.arange(-3, 3).astype(ml_dtypes.bfloat16).reshape(2, 3)
    np.savez(tmp_path / "x.npz", **{"Transformer/w": array, "f": np.asfortranarray(array)})
    assert np.load(tmp_path / "x.npz")["Transformer/w"].dtype == np.dtype("V2")
    with open_checkpoint(tmp_path / "x.npz") as checkpoint:
        _assert_same(checkpoint, {"Transformer/w": array, "f": array})


def test_npy_written_by_python_2_is_read(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L,)}".ljust(117) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", npy + np.array([1, 2], np.float32).tobytes())
    with open_checkpoint(tmp_path / "x.npz") as checkpoint:
        np.testing.assert_array_equal(checkpoint["a"].read(), [1, 2])


class _Code:
    """Pickles to a call; the file it would make must never appear."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def _npy(descr: str, shape: str, data: bytes = b"", version: int = 1) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    width = 2 if version == 1 else 4
    return (
        b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(width, "little") + header + data
    )


NPYS = {
    "no array": (b"hello world, I am no array", "member 'a' is not a .npy array"),
    "empty": (b"", "is not a .npy array"),
    "version 9": (_npy("'<f4'", "(1,)", b"1234", version=9), "is not one of numbers|only support"),
    "version 3": (_npy("'<f4'", "(1,)", b"1234", version=3), "not one of numbers"),
    "structured": (_npy("[('a', '<f4')]", "(1,)", b"1234"), "must be of numbers"),
    "subarray": (_npy("'(1000000,)f4'", "(1,)"), "must be of numbers"),
    "text": (_npy("'<U1'", "(1,)", b"1234"), "must be of numbers"),
    "void of 4": (_npy("'|V4'", "(1,)", b"1234"), "must be of numbers"),
    "dates": (_npy("'<M8[s]'", "(1,)", b"12345678"), "must be of numbers"),
    "objects": (_npy("'|O'", "(1,)", b"12345678"), "holds Python objects"),
    "code in header": (_npy("__import__('os').abort()", "(1,)"), "not a .npy array"),
    "nested header": (_npy("(" * 900 + ")" * 900, "(1,)"), "not a .npy array"),
    "long header": (_npy("'<f4'" + " " * 20_000, "(1,)", b"1234", version=2), "not a .npy array"),
    "header cut": (_npy("'<f4'", "(1,)")[:20], "not a .npy array"),
    "shape negative": (_npy("'<f4'", "(-1,)"), "at least 0"),
    "shape huge": (_npy("'<f4'", f"({2**62}, 4)"), "any memory"),
    "terabyte": (_npy("'<f4'", f"({2**38},)", b"1234"), "takes 10995116278.. bytes"),
    "too long": (_npy("'<f4'", "(1,)", b"12345"), "the archive states"),
    "too short": (_npy("'<f4'", "(1,)", b"123"), "the archive states"),
}


@pytest.mark.parametrize("case", NPYS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_bad_array_in_npz_is_refused(tmp_path: Path, case: str, method: int) -> None:
    data, message = NPYS[case]
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", data)

    def refused() -> None:
        with pytest.raises(CheckpointError, match=message) as info:
            open_checkpoint(path)
        assert str(path) in str(info.value)

    assert _peak(refused) < 8_000_000


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_beside_arrays_in_npz_are_left_out_and_named(tmp_path: Path, compressed) -> None:
    path = tmp_path / "x.npz"
    extra = {
        "labels": np.array(["a", "bc"]),
        "bytes": np.array([b"a"]),
        "when": np.array("2020-01-01", "datetime64[s]"),
        "table": np.zeros(2, [("a", "<f4")]),
    }
    (np.savez_compressed if compressed else np.savez)(path, w=np.arange(3.0), **extra)
    with open_checkpoint(path) as checkpoint, np.load(path) as peer:
        assert list(checkpoint) == ["w"]
        np.testing.assert_array_equal(checkpoint["w"].read(), peer["w"])
        assert set(checkpoint.left_out) == set(peer) - {"w"}
        assert "<U2" in checkpoint.left_out["labels"]


def test_texts_beside_arrays_in_msgpack_are_left_out_and_named(tmp_path: Path) -> None:
    tree = {
        "params": {"w": np.arange(3.0, dtype=np.float32)},
        "note": "text",
        "blob": b"bytes",
        "labels": np.array(["a", "bc"]),
        "list": [1, ["a", {"b": np.ones(2)}]],
        "last": np.float32(2),
    }
    path = tmp_path / "x.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    del tree["labels"]  # Flax writes it, and cannot read it
    peer = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(tree))
    with open_checkpoint(path) as checkpoint:
        assert sorted(checkpoint) == ["last", "params/w"]
        np.testing.assert_array_equal(checkpoint["params/w"].read(), peer["params"]["w"])
        assert checkpoint["last"].read() == peer["last"]
        assert sorted(checkpoint.left_out) == ["blob", "labels", "list", "note"]


def test_objects_in_npz_are_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([_Code(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "x.npz", objects=objects, allow_pickle=True)
    with pytest.raises(CheckpointError, match="array 'objects' holds Python objects"):
        open_checkpoint(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


def test_bad_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for method, name, message in (
        (zipfile.ZIP_STORED, "a.txt", "'a.txt' is not a .npy array"),
        (zipfile.ZIP_BZIP2, "a.npy", "compressed in a way numpy does not write"),
        (zipfile.ZIP_LZMA, "a.npy", "compressed in a way numpy does not write"),
    ):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(name, _npy("'<f4'", "(1,)", b"1234"))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", _npy("'<f4'", "(1,)", b"1234"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", _npy("'<f4'", "(1,)", b"1234"))
    with pytest.raises(CheckpointError, match=r"member 'a\.npy' twice"):
        open_checkpoint(path)


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    """A small member that states gigabytes: impossible for deflate, or a constant too large."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", _npy("'|u1'", "(4000000000,)", b"\x00" * 100_000))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[0]
    old = info.file_size.to_bytes(4, "little")
    central = data.index(b"PK\x01\x02")
    at = data.index(old, central)
    data[at : at + 4] = (4_000_000_000 + info.file_size - 100_000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="a zip bomb; refused"):
        open_checkpoint(path)
    # A constant of a real head's size, which compresses as far as deflate can, is no bomb.
    np.savez_compressed(path, kernel=np.zeros((21843, 192), np.float32))
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint["kernel"].read().any()


def test_a_flipped_bit_in_npz_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(1000.0), b=np.ones(3))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[5000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with open_checkpoint(tmp_path / "x.npz") as checkpoint:
        checkpoint["b"].read()
        with pytest.raises(CheckpointError, match=r"'a\.npy' cannot be read .*CRC"):
            checkpoint["a"].read()


# -- torch


def _bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().contiguous().clone()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(tmp_path: Path, zipped: bool) -> None:
    tensors = _torch_tensors()
    if zipped:  # the older format does not know float8
        tensors["eighth"] = torch.randn(5).to(torch.float8_e4m3fn)
        tensors["eighth_e5"] = torch.randn(5).to(torch.float8_e5m2)
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "torch"
        assert list(checkpoint) == list(tensors)
        for name, tensor in tensors.items():
            array = checkpoint[name].read()
            assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
            assert array.shape == tuple(tensor.shape)
            assert np.ascontiguousarray(array).tobytes() == _bits(tensor), name


def test_torch_wrappers_keep_their_path(tmp_path: Path) -> None:
    weight = torch.ones(2)
    contents = {
        "model": torch.nn.Linear(2, 3).state_dict(),
        "optimizer": {"state": {0: {"exp_avg": weight}}, "param_groups": [{"lr": 1e-3}]},
        "args": argparse.Namespace(lr=1e-3, arch="vit_small"),
        "epoch": 7,
        "note": "text",
        "pos_embed": weight,
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(contents, path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == [
            *("model/weight", "model/bias", "optimizer/state/0/exp_avg", "pos_embed")
        ]


class _TorchCode(_Code):
    pass


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("code", [_Code, lambda path: subprocess.Popen])
def test_code_in_a_torch_pickle_is_refused_and_never_run(
    tmp_path: Path, zipped: bool, code: Callable
) -> None:
    path = tmp_path / "pytorch_model.bin"
    contents = {"weight": torch.ones(2), "evil": code(tmp_path / "ran")}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"asks for code.* nothing in it was run") as info:
        open_checkpoint(path)
    assert str(path) in str(info.value)
    assert "weights_only" not in str(info.value)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    import pickle

    for protocol in range(6):
        for name in ("x.bin", "x.pt"):
            (tmp_path / name).write_bytes(pickle.dumps(_Code(tmp_path / "ran"), protocol))
            with pytest.raises(CheckpointError, match=name):
                open_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_torch_files_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def refused(contents: object, message: str) -> None:
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)

    refused(torch.ones(2), "holds a Tensor; wanted a mapping")
    refused([torch.ones(2)], "holds a list; wanted a mapping")
    refused({"a": torch.ones(2).to_sparse()}, "'a' is sparse, quantized or without numbers")
    refused({"a": torch.empty(2, device="meta")}, "'a' is sparse, quantized or without numbers")
    refused({"a": torch.zeros(1).expand(2**40)}, r"states shape \[1099511627776\], more than")
    refused({1: torch.ones(1), "1": torch.ones(1)}, "both named '1'")
    refused({"a": torch.zeros(2).to(torch.float8_e4m3fn).view(torch.bits8)}, "dtype bits8")
    itself: dict = {}
    itself["a"] = itself
    refused(itself, "nested more than 32 deep, or hold themselves")
    shared: dict = {"weight": torch.ones(1)}
    for _ in range(30):  # 2**30 names in a file of a few hundred bytes
        shared = {"a": shared, "b": shared}
    refused(shared, "more than 100000 entries")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="TorchScript program, not weights"):
        open_checkpoint(tmp_path / "x.pt")


def test_without_torch_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="run `pip install torch`, or give"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_an_unsafe_torch_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch 2\.5\.1.*Wanted 2\.6"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
