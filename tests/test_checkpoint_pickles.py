"""Torch's pickles: what training scripts put beside the weights is passed over; nothing is run."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import io
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
import types
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_common.errors import CheckpointError
from vit_common.files.checkpoint import open_checkpoint
from vit_common.files.containers import pickles

INERT = {
    "float64": np.float64(0.9),
    "int64": np.int64(3),
    "bool_": np.bool_(True),
    "array": np.arange(6.0).reshape(2, 3),
    "large array": np.zeros(100_000),
    "texts": np.array(["a", "b"]),
    "numpy dtype": np.dtype("float32"),
    "numpy type": np.float32,
    "random state": np.random.RandomState(0).get_state(),
    "RandomState": np.random.RandomState(0),
    "Generator": np.random.default_rng(0),
    "datetime": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    "date": datetime.date(2020, 1, 1),
    "timedelta": datetime.timedelta(3),
    "namespace": argparse.Namespace(lr=1e-3, inner=argparse.Namespace(path=Path("/a"))),
    "simple namespace": types.SimpleNamespace(lr=1e-3),
    "path": Path("/a/b"),
    "pure path": pathlib.PureWindowsPath("c:/a"),
    "size": torch.Size([1, 2]),
    "device": torch.device("cuda:0"),
    "dtype": torch.bfloat16,
    "layout": torch.strided,
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "bytes": b"1234",
    "bytearray": bytearray(b"1234"),
    "complex": 1 + 2j,
    "slice": slice(1, 2),
    "range": range(3),
    "deque": collections.deque([1, 2]),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 2),
    "uuid": uuid.UUID(int=3),
    "list of scalars": [np.float32(1), {"a": np.int32(2)}],
    "tuple": (np.float32(1), None),
    "text": "a text",
    "huge int": 10**400,
}


def _save(path: Path, contents: object, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(contents, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_inert_values_beside_weights_are_left_out_and_named(tmp_path, zipped, protocol) -> None:
    weights = torch.nn.Linear(3, 2).state_dict()
    path = _save(tmp_path / "a.pth", {"model": weights, **INERT}, zipped, protocol)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["model/weight", "model/bias"]
        assert list(checkpoint.left_out) == list(INERT)
        assert checkpoint.left_out["text"] == "str"
        assert checkpoint.left_out["datetime"] == "datetime.datetime"
        for name, value in weights.items():
            np.testing.assert_array_equal(checkpoint[f"model/{name}"].read(), value.numpy())


def test_mappings_of_training_scripts_are_read_as_mappings(tmp_path) -> None:
    weight = torch.arange(4.0)
    contents = {
        "model": collections.OrderedDict(weight=weight),
        "more": collections.defaultdict(list, best=weight, seen=[1]),
        "counts": collections.Counter("aab"),
        3: {None: weight, 1.5: weight, (1, 2): weight, 2**70: weight, b"b": weight},
    }
    with open_checkpoint(_save(tmp_path / "a.pth", contents)) as checkpoint:
        names = ["model/weight", "more/best", "3/None", "3/1.5"]
        assert [name for name in checkpoint if "(" not in name] == [*names, "3/b"]
        assert len(checkpoint) == 7
        for tensor in checkpoint.values():
            np.testing.assert_array_equal(tensor.read(), weight.numpy())


# -- what would run code


class _Call:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class _Color(enum.Enum):
    RED = 1


class _State:
    def __setstate__(self, state: dict) -> None:
        Path(state["path"]).touch()

    def __getstate__(self) -> dict:
        return {"path": _State.path}


EVIL: dict[str, Callable[[Path], object]] = {
    "os.system": lambda ran: _Call(os.system, f"touch {ran}"),
    "eval": lambda ran: _Call(eval, f"open({str(ran)!r}, 'w')"),
    "exec": lambda ran: _Call(exec, f"open({str(ran)!r}, 'w')"),
    "import": lambda ran: _Call(__import__, "os"),
    "getattr": lambda ran: _Call(getattr, "a", "upper"),
    "open": lambda ran: _Call(open, str(ran), "w"),
    "Path.touch": lambda ran: _Call(Path.touch, ran),
    "a chain": lambda ran: _Call(_Call, os.system, _Call(str, "a")),
    "inside a plain call": lambda ran: _Call(complex, _Call(os.system, f"touch {ran}")),
    "as a factory": lambda ran: collections.defaultdict(os.getcwd),
    "as a key": lambda ran: {os.getcwd: 1},
    "in a namespace": lambda ran: argparse.Namespace(f=_Call(os.system, f"touch {ran}")),
    "in a state": lambda ran: _State(),
    "an enum": lambda ran: _Color.RED,
    "torch.load": lambda ran: _Call(torch.load, str(ran)),
    "torch.hub": lambda ran: _Call(torch.hub.load, str(ran), "a"),
    "numpy.load": lambda ran: _Call(np.load, str(ran)),
    "numpy.fromfile": lambda ran: _Call(np.fromfile, str(ran)),
    "a module": lambda ran: torch.nn.Linear(2, 2),
    "an optimizer": lambda ran: torch.optim.SGD([torch.ones(1)], 0.1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", EVIL)
def test_pickles_that_ask_for_code_are_refused_and_run_nothing(tmp_path, case, zipped) -> None:
    _State.path = str(tmp_path / "ran")
    value = EVIL[case](tmp_path / "ran")
    path = _save(tmp_path / "a.pth", {"weight": torch.ones(2), "evil": value}, zipped)
    with pytest.raises(CheckpointError, match=r"asks for code.* nothing in it was run"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\nX\x04\0\0\0true\x85R.",
        b"cbuiltins\nbytes\ncos\nsystem\n\x85R.",
        b"c__builtin__\neval\nX\x01\0\0\0" + b"1\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\0\0\0__class__cos\nsystem\nsb.",
        b"ctorch\nSize\n.__class__\n.",
        b"(X\x04\0\0\0trueios\nsystem\n.",
        b"\x82\x01.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    ],
)
def test_programs_written_by_hand_are_refused(tmp_path, program: bytes) -> None:
    path = _zip(tmp_path / "a.pth", b"}" + program[:-1] + b"0." if program[-1:] == b"." else b"")
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def _zip(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"archive/data/{name.removeprefix('s')}", data)
    return path


# -- storages


def _whole(zipped: bool, tensors: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def test_a_legacy_file_that_never_fills_a_storage_is_refused(tmp_path) -> None:
    """torch gives whatever was in memory there."""
    data = _whole(False, {"a": torch.ones(1000), "b": torch.ones(1000)})
    keys = data.rindex(b"\x80\x02]")
    listed = pickle.loads(data[keys : data.index(b".", keys) + 1])
    for left in (listed[:1], []):
        body = data[:keys] + pickle.dumps(left, 2)
        for _ in left:
            body += struct.pack("<q", 1000) + np.ones(1000, "<f4").tobytes()
        (tmp_path / "a.pth").write_bytes(body)
        with pytest.raises(CheckpointError, match="storages that the file does not hold"):
            open_checkpoint(tmp_path / "a.pth")
    for broken in (data[:-1], data[:-4008], data[: keys + 60]):
        (tmp_path / "a.pth").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"truncated|corrupt"):
            open_checkpoint(tmp_path / "a.pth")
    where = data.index(struct.pack("<q", 1000), keys)
    (tmp_path / "a.pth").write_bytes(data[:where] + struct.pack("<q", 999) + data[where + 8 :])
    with pytest.raises(CheckpointError, match="holds 1000 numbers; the file has 999"):
        open_checkpoint(tmp_path / "a.pth")


def test_a_zip_file_whose_storages_do_not_hold_the_tensors_is_refused(tmp_path) -> None:
    stream = io.BytesIO(_whole(True, {"a": torch.ones(1000)}))
    with zipfile.ZipFile(stream) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}

    def write(**changes: bytes | None) -> Path:
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            for name, data in {**members, **changes}.items():
                if data is not None:
                    archive.writestr(f"archive/{name}", data)
        return tmp_path / "a.pth"

    with open_checkpoint(write()) as checkpoint:
        np.testing.assert_array_equal(checkpoint["a"].read(), np.ones(1000, np.float32))
    for data, message in (
        (None, "'0', which is not in the archive"),
        (bytes(3999), "is to hold 4000 bytes; it has 3999"),
        (b"", "is to hold 4000 bytes; it has 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(write(**{"data/0": data}))
    program = members["data.pkl"]
    shape = b"M\xe8\x03\x85"  # (1000,)
    assert program.count(shape) == 1
    for other in (b"M\xe9\x03\x85", b"J\xff\xff\xff\x7f\x85"):
        with pytest.raises(CheckpointError, match=r"reaches to byte|more than the file"):
            open_checkpoint(write(**{"data.pkl": program.replace(shape, other)}))
    offset = b"K\0" + shape
    assert program.count(offset) == 1
    moved = program.replace(offset, b"K\x01" + shape)
    with pytest.raises(CheckpointError, match="reaches to byte 4004 of a storage of 4000"):
        open_checkpoint(write(**{"data.pkl": moved}))
    negative = program.replace(offset, b"J\xff\xff\xff\xff" + shape)
    with pytest.raises(CheckpointError, match="corrupt"):
        open_checkpoint(write(**{"data.pkl": negative}))


def test_members_that_lie_on_each_other_are_refused(tmp_path) -> None:
    data = bytearray(_whole(True, {"a": torch.ones(1000), "b": torch.zeros(1000)}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first, second = (archive.getinfo(f"archive/data/{i}") for i in "01")
    old, new = (struct.pack("<L", info.header_offset) for info in (second, first))
    central = data.rindex(
        b"PK\x01\x02", 0, data.index(b"archive/data/1", second.header_offset + 50)
    )
    at = data.index(old, central)
    data[at : at + 4] = new
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="another name in front of its data"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_views_are_those_of_torch(tmp_path, zipped: bool) -> None:
    base = torch.randn(6, 8, 2, generator=torch.Generator().manual_seed(0))
    number = torch.view_as_complex(base.clone())
    tensors = {
        "rows": base[2:],
        "columns": base[:, 1:3],
        "steps": base[::2, 1::3],
        "turned": base.permute(2, 0, 1),
        "spread": base[0, 0, :1].expand(5),
        "one": base[3, 4, 1],
        "none": base[:0],
        "conjugate": number.conj(),
        "imaginary": torch.view_as_complex(base.clone()).conj().imag,
        "half": base.bfloat16()[::2],
        "parameter": torch.nn.Parameter(base[1:3]),
    }
    path = tmp_path / "a.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    peer = torch.load(path, weights_only=True)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == list(tensors)
        for name, tensor in peer.items():
            tensor = tensor.detach().resolve_conj().resolve_neg()
            found = checkpoint[name].read()
            wanted = tensor.float().numpy() if name == "half" else tensor.numpy()
            np.testing.assert_array_equal(found.astype(wanted.dtype), wanted)
            if tensor.ndim:
                part = (slice(1, 3), *[slice(None)] * (tensor.ndim - 1))
                part_found = checkpoint[name].read_part(part)
                np.testing.assert_array_equal(part_found.astype(wanted.dtype), wanted[part])


def test_without_checksums_files_are_read(tmp_path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(tmp_path / "a.pth") as checkpoint:
        assert checkpoint["a"].read().tolist() == [1, 1, 1]


def test_large_tensors_are_not_read_at_opening(tmp_path) -> None:
    for zipped in (True, False):
        _save(tmp_path / "a.pth", {f"{i}": torch.zeros(1_000_000) for i in range(5)}, zipped)
        tracemalloc.start()
        try:
            with open_checkpoint(tmp_path / "a.pth") as checkpoint:
                assert tracemalloc.get_traced_memory()[1] < 1_000_000
                checkpoint["3"].read()
                assert tracemalloc.get_traced_memory()[1] < 6_000_000
        finally:
            tracemalloc.stop()


# -- bounds


def _bounded(path: Path, seconds: float = 10, memory: int = 400 << 20) -> str:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(CheckpointError) as info:
            open_checkpoint(path)
        assert time.perf_counter() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    return str(info.value)


def test_keys_with_equal_hashes_take_no_time(tmp_path) -> None:
    modulus = 2**61 - 1  # of Python's hashes of numbers
    keys = b"".join(
        b"\x8a\x0a" + (modulus * i).to_bytes(10, "little", signed=True) + b"K\x01"
        for i in range(1, 30_000)
    )
    path = _zip(tmp_path / "a.pth", b"}(" + keys + b"u.")
    start = time.perf_counter()
    open_checkpoint(path).close()
    assert time.perf_counter() - start < 5
    deep = (
        b"K\x01\x85q\x010" + b"h\x01h\x01\x86q\x010" * 60 + b"h\x01"
    )  # a tuple that is dear to hash
    path = _zip(tmp_path / "b.pth", b"}" + deep + b"K\x01s.")
    open_checkpoint(path).close()


@pytest.mark.parametrize(
    "program",
    [
        b"}" * 400_000,
        b"(" * 400_000,
        b"]q\0" + b"h\0" * 400_000,
        b"N" * 400_000 + b".",
        b"X\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 8,
        b"c" + b"a" * 100_000,
        b"\x95" + b"\xff" * 8 + b"}",
        b"",
        b".",
        b"}}",
        b"h\x07.",
        b"Ks",
    ],
)
def test_pickles_without_end_or_sense_are_refused(tmp_path, program: bytes, monkeypatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 30_000)
    assert len(_bounded(_zip(tmp_path / "a.pth", program))) < 1000


def test_a_tar_archive_takes_no_time(tmp_path) -> None:
    """torch looks for its oldest format with a regular expression that takes seconds."""
    path = tmp_path / "a.pth"
    header = bytearray(512)
    header[:8], header[257:263] = b"storages", b"ustar\0"
    path.write_bytes(bytes(header) + b"1" * 1_000_000 + b"=" * 100)
    _bounded(path, 1)


def test_a_directory_of_a_million_members_is_refused(tmp_path) -> None:
    one = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *[0] * 18)
    count = 100_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(one) * count, 0, 0)
    for name in ("a.pth", "a.npz"):
        (tmp_path / name).write_bytes(one * count + end)
        _bounded(tmp_path / name, 5, 100 << 20)
