"""Files whose sizes and offsets need more than 31 or 32 bits; most are files of holes."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
import safetensors
import torch

from vit_common.files.checkpoint import open_checkpoint, write_checkpoint
from vit_convert.convert import convert

GIB = 1 << 30
LAST = np.array([1, 2], "<f4")


def _npy(descr: str, count: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": (count,)}
    )
    return stream.getvalue()


def _write_zip(path: Path, members: list[tuple[str, bytes, int, bytes]]) -> None:
    """A stored zip64 archive; of each member the first bytes, the size of a hole, and the last."""
    central = b""
    with path.open("wb") as stream:
        for name, head, hole, tail in members:
            start, size = stream.tell(), len(head) + hole + len(tail)
            both = struct.pack("<QQ", size, size)
            checksum = 0 if hole else zlib.crc32(head + tail)
            fields = struct.pack("<HHHHHIII", 45, 0, 0, 0, 33, checksum, 2**32 - 1, 2**32 - 1)
            raw = name.encode()
            extra = struct.pack("<HH", 1, 16) + both
            stream.write(b"PK\x03\x04" + fields + struct.pack("<HH", len(raw), len(extra)))
            stream.write(raw + extra + head)
            stream.seek(hole, 1)
            stream.write(tail)
            extra = struct.pack("<HH", 1, 24) + both + struct.pack("<Q", start)
            central += b"PK\x01\x02" + struct.pack("<H", 45) + fields
            central += struct.pack("<HHHHHII", len(raw), len(extra), 0, 0, 0, 0, 2**32 - 1)
            central += raw + extra
        at = stream.tell()
        count = len(members)
        stream.write(central + b"PK\x06\x06")
        stream.write(
            struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(central), at)
            + struct.pack("<4sIQI", b"PK\x06\x07", 0, at + len(central), 1)
            + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
        )
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert sizes == {name: len(head) + hole + len(tail) for name, head, hole, tail in members}


@pytest.mark.parametrize("size", [4 * GIB + 8, 100 * GIB])
def test_npz(tmp_path, size):
    members = [
        ("a.npy", _npy("|u1", size), size, b""),
        ("b.npy", _npy("<f4", 2), 0, LAST.tobytes()),
    ]
    _write_zip(tmp_path / "a.npz", members)
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        assert checkpoint["a"].shape == (size,)
        assert checkpoint["b"].row(1, "last").read() == 2
        assert checkpoint["a"].row(size - 1, "zero").read() == 0


@pytest.mark.parametrize("size", [4 * GIB + 8, 100 * GIB])
def test_torch(tmp_path, size):
    small = {"a": torch.zeros(7777, dtype=torch.uint8), "b": torch.from_numpy(LAST.copy())}
    stream = io.BytesIO()
    torch.save(small, stream)
    with zipfile.ZipFile(stream) as archive:
        program = archive.read("archive/data.pkl")
    count = b"M" + (7777).to_bytes(2, "little")
    assert program.count(count) == 2  # the storage and the shape
    program = program.replace(count, b"\x8a\x08" + size.to_bytes(8, "little"))
    members = [
        ("archive/data.pkl", program, 0, b""),
        ("archive/byteorder", b"little", 0, b""),
        ("archive/data/0", b"", size, b""),
        ("archive/data/1", b"", 0, LAST.tobytes()),
        ("archive/version", b"3\n", 0, b""),
    ]
    path = tmp_path / "a.pth"
    _write_zip(path, members)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["a"].shape == (size,)
        np.testing.assert_array_equal(checkpoint["b"].read(), LAST)
        assert checkpoint["a"].read_part((slice(size - 2, size),)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [4 * GIB + 8, 100 * GIB])
def test_legacy_torch(tmp_path, size):
    small = {"a": torch.zeros(7777, dtype=torch.uint8), "b": torch.from_numpy(LAST.copy())}
    stream = io.BytesIO()
    torch.save(small, stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue()
    # The two storages come in the order of their keys, which are addresses.
    at = data.index(struct.pack("<q", 7777), data.rindex(b"\x80\x02]"))
    before = data[:at].replace(
        b"M" + (7777).to_bytes(2, "little"), b"\x8a\x08" + size.to_bytes(8, "little")
    )
    path = tmp_path / "a.pth"
    with path.open("wb") as out:
        out.write(before + struct.pack("<q", size))
        rest = data[at + 8 + 7777 :]
        out.seek(size, 1)
        out.write(rest)
        out.truncate()
    if not rest:
        with path.open("rb+") as out:
            out.truncate(len(before) + 8 + size)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["a"].shape == (size,)
        np.testing.assert_array_equal(checkpoint["b"].read(), LAST)
        assert checkpoint["a"].read_part((slice(size - 2, size),)).tolist() == [0, 0]


@pytest.mark.parametrize("count", [5, 100])
def test_msgpack(tmp_path, count):
    """Arrays of a gigabyte, the largest that Flax does not split, and one behind them."""
    pack = msgpack.Packer()
    path = tmp_path / "flax_model.msgpack"
    with path.open("wb") as out:
        out.write(pack.pack_map_header(count + 1))
        for i in range(count):
            head = pack.pack_array_header(3) + pack.pack((GIB,)) + pack.pack("uint8")
            head += b"\xc6" + GIB.to_bytes(4, "big")
            out.write(pack.pack(f"a{i}") + b"\xc9" + (len(head) + GIB).to_bytes(4, "big") + b"\x01")
            out.write(head)
            out.seek(GIB, 1)
        last = msgpack.packb(((2,), "float32", LAST.tobytes()))
        out.write(pack.pack("b") + msgpack.packb(msgpack.ExtType(1, last)))
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == count + 1
        np.testing.assert_array_equal(checkpoint["b"].read(), LAST)


def test_shards_beyond_4_gb_in_all(tmp_path):
    size = 3 * GIB
    weight_map = {}
    for i in range(3):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        text = json.dumps({f"w{i}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
        with (tmp_path / name).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text.encode())
            out.truncate(8 + len(text) + size)
        weight_map[f"w{i}"] = name
    index = {"metadata": {"total_size": 3 * size}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path / "model.safetensors.index.json") as checkpoint:
        assert sum(tensor.nbytes for tensor in checkpoint.values()) == 9 * GIB


class _Gigabyte:
    shape, dtype = (GIB,), np.dtype(np.uint8)

    def read(self) -> np.ndarray:
        return np.zeros(GIB, np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".msgpack", ".npz", ".pth"])
def test_files_beyond_4_gb_are_written(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    try:
        write_checkpoint(path, {**{f"a{i}": _Gigabyte() for i in range(5)}, "b": LAST})
        assert path.stat().st_size > 5 * GIB
        if suffix == ".safetensors":
            with safetensors.safe_open(path, "numpy") as peer:
                found = peer.get_tensor("b")
        elif suffix == ".npz":
            with np.load(path) as peer:
                found = peer["b"]
        elif suffix == ".pth":
            found = torch.load(path, mmap=True, weights_only=True)["b"].numpy()
        else:
            with path.open("rb") as stream:
                stream.seek(-8, 2)
                found = np.frombuffer(stream.read(), "<f4")
        np.testing.assert_array_equal(found, LAST)
        with open_checkpoint(path) as checkpoint:
            np.testing.assert_array_equal(checkpoint["b"].read(), LAST)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_sharded_network_of_3_gb_becomes_one_file(tmp_path):
    from test_convert_memory import hub_shapes

    D, L = 1664, 24
    shapes = hub_shapes(D, L, inner=4 * D, patch=14, image=28, classes=10)
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": 16,
        "intermediate_size": 4 * D,
        "patch_size": 14,
        "image_size": 28,
        "id2label": {str(i): str(i) for i in range(10)},
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    names = sorted(shapes)
    weight_map = {}
    for part in range(2):
        header, position = {}, 0
        for name in names[part::2]:
            size = 4 * int(np.prod(shapes[name]))
            entry = {"dtype": "F32", "shape": shapes[name]}
            header[name] = {**entry, "data_offsets": [position, position + size]}
            position += size
            weight_map[name] = f"model-0000{part + 1}-of-00002.safetensors"
        text = json.dumps(header).encode()
        with (source / f"model-0000{part + 1}-of-00002.safetensors").open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    target = tmp_path / "out" / "model.safetensors"
    try:
        report = convert(source, target, to="hub")
        assert report.verification is not None
        assert target.stat().st_size > 3_040_000_000
        with safetensors.safe_open(target, "numpy") as peer:
            assert sorted(peer.keys()) == names
    finally:
        target.unlink(missing_ok=True)
