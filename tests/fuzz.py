"""Bent files for every reader: each must load, or be refused by a `ViTError`, soon and small.

    python tests/fuzz.py --seconds 60            # new inputs each time; `make fuzz SECONDS=60`
    python tests/fuzz.py --readers npz --seed 7 --first 123 --inputs 1     # one of them again

Every reader has a few whole files. An input is one of them, bent where it hurts: bytes flipped,
moved or cut; or its parts taken out (JSON values, members of an archive, tokens of a pickle, keys
of a map), replaced and put together again. Reader, seed and number make an input, and nothing else.
An input that ends in any other error, or takes too long or too much memory, is kept, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import PIL.Image

from vit_common.errors import ViTError

SECONDS = 6.0
"""Processor time that one input may take; the slowest allowed ones take about a second."""

MEMORY = 400 << 20
"""Bytes of memory that one input may add to the process; the whole files have a few kB."""

Bend = Callable[[random.Random, bytes], bytes]


@dataclass
class Reader:
    """What is fuzzed.

    Attributes:
        name: of it.
        make: files of a folder, by name, of which the first is bent.
        bend: how, besides by its bytes.
        read: reads what is in the folder.
    """

    name: str
    make: Callable[[], list[dict[str, bytes]]]
    bend: Bend
    read: Callable[[Path], object]
    seeds: list[dict[str, bytes]] = field(default_factory=list)


# -- bending: bytes

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def bend_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, move, repeat, overwrite with numbers; mostly near the ends."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not out:
            break
        near = rng.choice((64, 512, 4096, len(out)))
        at = rng.randrange(min(near, len(out)))
        at = len(out) - 1 - at if rng.random() < 0.4 else at
        what = rng.randrange(8)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at] = rng.randrange(256)
        elif what == 2:
            del out[at : at + rng.choice((1, 2, 8, 100))]
        elif what == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
        elif what == 4:
            del out[at:]
        elif what == 5:
            end = rng.randrange(len(out) + 1)
            out[at:at] = out[min(at, end) : max(at, end)][:5000]
        else:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(out)


# -- bending: JSON

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**70, 10**400, 0.5, 1e308, -0.0),
    *(math.nan, math.inf, "", "a", "0", "float32", "gelu", "vit", "\0", "\ud800", "x" * 30_000),
    *([], {}, [[]], [1, 2], [None], {"a": 1}, ["a"] * 5000, {"": ""}, [-1, 2**40]),
)


def bend_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with something in it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        what = rng.randrange(6)
        out = dict(value)
        if what == 0:
            del out[key]
        elif what == 1:
            out[rng.choice(("a", "__metadata__", key + "x", "weight_map", ""))] = out[key]
        elif what == 2:
            out[key] = out[rng.choice(list(out))]
        else:
            out[key] = bend_value(rng, out[key])
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        out_list = list(value)
        at = rng.randrange(len(out_list))
        out_list[at] = bend_value(rng, out_list[at])
        if rng.random() < 0.3:
            out_list.append(rng.choice(out_list))
        return out_list
    if rng.random() < 0.03:
        nested: Any = rng.choice((0, {}))
        for _ in range(rng.choice((50, 500))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2**31, -value))
    return rng.choice(ODD_VALUES)


def bend_json(rng: random.Random, data: bytes) -> bytes:
    table = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        table = bend_value(rng, table)
    text = json.dumps(table)
    if rng.random() < 0.1:  # what no writer of JSON writes
        at = rng.randrange(len(text) + 1)
        odd = ("\ufeff", " ", "[" * 100_000, '{"a":' * 5000, "9" * 5000, ",", "\0", '"a":1,')
        text = text[:at] + rng.choice(odd) + text[at:]
    return text.encode("utf-8", "surrogatepass")


def bend_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines: bent, cut, doubled, moved, and of another kind."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        what = rng.randrange(7)
        if what == 0:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif what == 1:
            lines.insert(at, rng.choice(lines))
        elif what == 2 and len(lines) > 1:
            del lines[at]
        elif what == 3:
            lines.insert(at, rng.choice((b"\n", b"{}\n", b"[]\n", b"null\n", b"3\n", b"\xff\n")))
        else:
            with contextlib.suppress(ValueError):
                table = bend_value(rng, json.loads(lines[at]))
                lines[at] = json.dumps(table).encode() + b"\n"
    return b"".join(lines)


# -- bending: containers


def bend_safetensors(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = bend_json(rng, data[8 : 8 + length])
    stated = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return stated.to_bytes(8, "little") + text + data[8 + length :]


def bend_msgpack(rng: random.Random, data: bytes) -> bytes:
    tree = msgpack.unpackb(data, strict_map_key=False)

    def bend(value: Any) -> Any:
        if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            out = dict(value)
            if rng.random() < 0.15:
                out[rng.choice(("a", "x" * 2000, "\ud800", "__msgpack_chunked_array__"))] = out[key]
            elif rng.random() < 0.1:
                del out[key]
            else:
                out[key] = bend(out[key])
            return out
        if isinstance(value, msgpack.ExtType) and rng.random() < 0.8:
            parts = list(msgpack.unpackb(value.data, raw=True))
            at = rng.randrange(len(parts))
            odd = (-1, 2**40, b"float64", b"str8", b"object", b"", [], [2**31], [0], [[1]], None)
            parts[at] = rng.choice(odd)
            code = rng.choice((value.code, value.code, 2, 3, 9))
            return msgpack.ExtType(code, msgpack.packb(parts))
        odd_values = (None, 3, 1.5, "text", b"bytes", [1, [2]], {}, {"0": 1}, [[]] * 50, 2**63)
        return rng.choice(odd_values)

    for _ in range(rng.choice((1, 1, 2))):
        tree = bend(tree)
    with contextlib.suppress(UnicodeEncodeError):
        data = msgpack.packb(tree)
    return data


def bend_pickle(rng: random.Random, data: bytes) -> bytes:
    """Tokens dropped, doubled, swapped, or with another argument."""
    starts = [position for _, _, position in pickletools.genops(data)]
    ends = [*starts[1:], len(data)]
    tokens = [data[a:b] for a, b in zip(starts, ends, strict=True)]
    odd = (
        *(b"0", b"(", b"N", b"K\x00", b"]", b"}", b")", b"2", b"R", b"b", b"a", b"s", b"u", b"t"),
        *(b"\x81", b"\x85", b"\x86", b"Q", b"e", b"\x8f", b"\x90", b"h\x00", b"h\x01", b"q\x01"),
        *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"ctorch\nHalfStorage\n"),
        *(b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
        *(b"X\x01\x00\x00\x00a", b"G\x7f\xf8" + bytes(6), b"."),
    )
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(tokens))
        what = rng.randrange(5)
        if what == 0:
            tokens[at] = rng.choice(odd)
        elif what == 1:
            tokens.insert(at, rng.choice(odd))
        elif what == 2:
            tokens.insert(at, rng.choice(tokens))
        elif what == 3 and len(tokens) > 1:
            del tokens[at]
        else:
            tokens[at] = tokens[at][:1] + bend_bytes(rng, tokens[at][1:] or b"\0")[:2000]
    return b"".join(tokens)


def bend_legacy(rng: random.Random, data: bytes) -> bytes:
    """One of the five pickles, or what comes behind them."""
    parts, stream = [], io.BytesIO(data)
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[start : stream.tell()])
    parts.append(data[stream.tell() :])
    at = rng.choice((2, 3, 3, 3, 4, 5))
    parts[at] = bend_bytes(rng, parts[at]) if at == 5 else bend_pickle(rng, parts[at])
    return b"".join(parts)


def bend_npy(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin1")
    old = rng.choice(("'<f4'", "False", "(", ",", ")", "shape", "}"))
    new = ("'<U3'", "'|O'", "'<f8'", "'V2'", "True", "(2**40,", "-1,", "9" * 400, "((", "'", "[]")
    header = header.replace(old, rng.choice(new), 1)
    return (
        data[:8]
        + (len(header) % 65536).to_bytes(2, "little")
        + header.encode()
        + data[10 + length :]
    )


def bend_zip(rng: random.Random, data: bytes) -> bytes:
    """A member bent by what it is, or members renamed, doubled, dropped, or packed otherwise."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    method = zipfile.ZIP_STORED
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(members))
        name, content = members[at]
        what = rng.randrange(10)
        if what == 0:
            members.append((name, content))
        elif what == 1 and len(members) > 1:
            del members[at]
        elif what == 2:
            other = rng.choice((name + "x", "", "../a", "a/data.pkl", "constants.pkl", "b.npy"))
            members[at] = other, content
        elif what == 3:
            method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        else:
            bend = {
                ".json": bend_json,
                ".npy": bend_npy,
                ".pkl": bend_pickle,
                ".safetensors": bend_safetensors,
            }.get(Path(name).suffix, bend_bytes)
            with contextlib.suppress(ValueError, IndexError, struct.error):
                members[at] = name, bend(rng, content)
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members:
            archive.writestr(name or "x", content)
    packed = out.getvalue()
    if rng.random() < 0.3:  # sizes and places in the directory at the end
        start = packed.find(b"PK\x01\x02")
        packed = packed[:start] + bend_bytes(rng, packed[start:])
    return packed


def bend_image(rng: random.Random, data: bytes) -> bytes:
    """A PNG's chunks, with checksums that fit; of others the bytes."""
    if not data.startswith(b"\x89PNG"):
        return bend_bytes(rng, data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    which = rng.randrange(len(chunks))
    kind, body = chunks[which]
    what = rng.randrange(5)
    if what == 0:
        chunks.insert(which, chunks[which])
    elif what == 1:
        text = zlib.compress(bytes(rng.choice((10, 10**6, 30 * 10**6))), 9)
        odd = (
            (b"zTXt", b"a\0\0" + text),
            (b"iCCP", b"a\0\0" + text),
            (b"tRNS", b"\0"),
            (b"PLTE", b""),
        )
        chunks.insert(rng.randrange(1, len(chunks)), rng.choice(odd))
    else:
        chunks[which] = kind, bend_bytes(rng, body or b"\0")
    out = data[:8]
    for kind, body in chunks:
        checksum = zlib.crc32(kind + body).to_bytes(4, "big")
        out += len(body).to_bytes(4, "big") + kind + body + checksum
    return out


# -- whole files

CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "dtype": "float32",
    "id2label": {"0": "zero", "1": "one", "2": "two"},
    "label2id": {"zero": 0, "one": 1, "two": 2},
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "a.bias": np.arange(3, dtype=np.int64),
        "b.flag": np.array([True, False]),
        "c": np.array(3, np.float32),
        "none": np.zeros((0, 2), np.float32),
    }


def _safetensors() -> list[dict[str, bytes]]:
    from safetensors.numpy import save

    return [{"model.safetensors": save(_arrays(), {"format": "pt"})}]


def _msgpack() -> list[dict[str, bytes]]:
    from flax.serialization import to_bytes

    tree = {"a": {"w": _arrays()["a.weight"], "n": 3, "f": 1.5}, "b": {"0": np.float32(2)}}
    return [{"flax_model.msgpack": to_bytes(tree)}]


def _npz() -> list[dict[str, bytes]]:
    out = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, names=np.array(["a", "b"]), **_arrays())  # type: ignore[operator]
        out.append({"model.npz": stream.getvalue()})
    return out


def _torch(zipped: bool) -> list[dict[str, bytes]]:
    import torch

    contents = {
        "model": {name: torch.from_numpy(array.copy()) for name, array in _arrays().items()},
        "half": torch.ones(2, 3).bfloat16().T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3),
        "best": np.float64(0.5),
    }
    stream = io.BytesIO()
    torch.save(contents, stream, _use_new_zipfile_serialization=zipped)
    return [{"checkpoint.pth": stream.getvalue()}]


def _index() -> list[dict[str, bytes]]:
    from safetensors.numpy import save

    arrays = _arrays()
    shards = {"model-1.safetensors": list(arrays)[:2], "model-2.safetensors": list(arrays)[2:]}
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 100}, "weight_map": weight_map}
    files = {shard: save({n: arrays[n] for n in names}) for shard, names in shards.items()}
    return [{"model.safetensors.index.json": json.dumps(index).encode(), **files}]


def _exported() -> list[dict[str, bytes]]:
    """A program that adds up; smaller than a network, and read by the same code."""
    import jax
    import jax.export
    import jax.numpy as jnp
    from safetensors.numpy import save

    from vit_common.versions import versions
    from vit_flax.export import read

    weights = {"w": np.ones((3 * 4 * 4, 2), np.float32)}
    program = jax.export.export(
        jax.jit(lambda p, x: x.reshape(x.shape[0], -1) @ p["w"]), platforms=["cpu"]
    )(
        {"w": jax.ShapeDtypeStruct((48, 2), jnp.float32)},
        jax.ShapeDtypeStruct((2, 3, 4, 4), jnp.float32),
    )
    metadata = {
        "kind": read.KIND,
        "version": read.VERSION,
        "input_shape": [3, 4, 4],
        "input_dtype": "float32",
        "output": "logits",
        "batch": 2,
        "platforms": ["cpu"],
        "calling_convention_version": program.calling_convention_version,
        "labels": ["zero", "one"],
        "several": False,
        "versions": versions("jax"),
    }
    processor = {**PROCESSOR, "size": {"height": 4, "width": 4}}
    members = {
        read.PROGRAM: bytes(program.serialize()),
        read.PARAMETERS: save(weights, {"format": "flax"}),
        read.METADATA: json.dumps(metadata).encode(),
        read.CONFIG: json.dumps(CONFIG).encode(),
        read.PROCESSOR: json.dumps(processor).encode(),
        read.CHECK: b"{}",
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return [{"model.vit": stream.getvalue()}]


_FILES = ["a.png", "b.png", "c.png"]


def _rows() -> list[dict[str, bytes]]:
    prediction = {"label": "zero", "index": 0, "probability": 0.5}
    rows: list[dict[str, Any]] = [{"run": {"model": "m"}}]
    rows += [{"file": file, "predictions": [prediction, prediction]} for file in _FILES[:2]]
    rows += [{"file": "c.png", "error": "broken"}]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return [{f"out.{suffix}.partial": data} for suffix in ("jsonl", "csv")]


def _images() -> list[dict[str, bytes]]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    out = []
    for mode, form in (
        *(("RGB", "png"), ("P", "png"), ("LA", "png"), ("I;16", "png"), ("1", "png")),
        *(("RGB", "jpeg"), ("CMYK", "jpeg"), ("P", "gif"), ("RGB", "bmp"), ("RGB", "tiff")),
        *(("RGB", "webp"), ("RGB", "ppm"), ("RGBA", "ico"), ("RGB", "tga")),
    ):
        stream = io.BytesIO()
        image = PIL.Image.fromarray(pixels)
        image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        image.save(stream, form)
        out.append({f"image.{form}": stream.getvalue()})
    return out


# -- readers


def _read_checkpoint(folder: Path) -> None:
    from vit_common.files.checkpoint import open_checkpoint

    names = [path.name for path in folder.iterdir()]
    name = next((n for n in names if n.endswith(".index.json")), names[0])
    with open_checkpoint(folder / name) as checkpoint:
        for tensor in checkpoint.values():
            array = tensor.read()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise AssertionError(f"{tensor} gave {array.dtype} of shape {array.shape}")


def _read_config(folder: Path) -> None:
    from vit_common.families import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    json.loads(config.to_json_string())


def _read_processor(folder: Path) -> None:
    from vit_common.images.auto import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    sizes = [n for n in [*processor.size.values()] if isinstance(n, int)]
    if all(n <= 2000 or n >= 2**24 for n in sizes):  # between, it is slow and large by right
        processor(np.zeros((20, 30, 3), np.uint8), return_tensors="np")


def _read_exported(folder: Path) -> None:
    from vit_flax.export import load

    (path,) = folder.iterdir()
    model = load(path)
    model.prepare(np.zeros((8, 8, 3), np.uint8))


def _read_rows(folder: Path) -> None:
    from vit_cli.runs.prediction_file import Journal

    (path,) = folder.iterdir()
    journal = Journal(str(path.with_suffix("")), resume=True, run={"model": "m"})
    with contextlib.closing(journal):
        for file in _FILES:
            if file not in journal.done:
                journal.fail(file, "again")
        journal.finish()
    written = path.with_suffix("").read_text("utf-8", "surrogateescape")
    if path.suffixes[-2:] == [".jsonl", ".partial"]:
        files = [json.loads(line)["file"] for line in written.splitlines()]
        if len(files) != len(set(files)) or not set(files) >= set(_FILES):
            raise AssertionError(f"the rows are of {files}")


def _read_image(folder: Path) -> None:
    from vit_common.images.pictures import load_image

    (path,) = folder.iterdir()
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, 4_000_000
    try:  # an image that is as large as it says is no fault
        load_image(path)
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", _safetensors, bend_safetensors, _read_checkpoint),
        Reader("msgpack", _msgpack, bend_msgpack, _read_checkpoint),
        Reader("npz", _npz, bend_zip, _read_checkpoint),
        Reader("torch", lambda: _torch(True), bend_zip, _read_checkpoint),
        Reader("torch-legacy", lambda: _torch(False), bend_legacy, _read_checkpoint),
        Reader("index", _index, bend_json, _read_checkpoint),
        Reader(
            "config",
            lambda: [{"config.json": json.dumps(CONFIG).encode()}],
            bend_json,
            _read_config,
        ),
        Reader(
            "processor",
            lambda: [{"preprocessor_config.json": json.dumps(PROCESSOR).encode()}],
            bend_json,
            _read_processor,
        ),
        Reader("exported", _exported, bend_zip, _read_exported),
        Reader("rows", _rows, bend_lines, _read_rows),
        Reader("images", _images, bend_image, _read_image),
    )
}


# -- running


class Slow(BaseException):
    """The alarm clock rang."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises where the block takes too long or too much memory."""

    def ring(*_: object) -> None:
        raise Slow

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGVTALRM, ring)
    # Address space is asked for in larger pieces than are used: threads, arenas of malloc.
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY + (1 << 30), limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    start = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, old)
    if time.process_time() - start > SECONDS:
        raise Slow
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MEMORY:
        raise MemoryError(f"took {grown >> 20} MB more")


def make_input(reader: Reader, seed: int, number: int) -> dict[str, bytes]:
    """The files of an input."""
    if not reader.seeds:
        reader.seeds = reader.make()
    rng = random.Random(f"{reader.name} {seed} {number}")
    files = dict(rng.choice(reader.seeds))
    name = next(iter(files))
    if number:  # the first is whole
        with contextlib.suppress(RecursionError):
            files[name] = reader.bend(rng, files[name])
        if rng.random() < 0.3:
            files[name] = bend_bytes(rng, files[name])
    return files


def try_input(reader: Reader, files: dict[str, bytes], root: Path) -> str:
    """How an input ends: "loads", the name of a ViTError, or what went wrong."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with bounded():
                    reader.read(folder)
            except ViTError as error:
                if len(str(error)) > 4000:
                    return f"FAILED: an error of {len(str(error))} characters"
                return type(error).__name__
            except Slow:
                return f"FAILED: more than {SECONDS:g} s"
            except (Exception, MemoryError) as error:
                frames = traceback.extract_tb(error.__traceback__)
                own = [f for f in frames if "/vit_" in f.filename or "/convert/" in f.filename]
                place = own[-1] if own else frames[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                return f"FAILED: {type(error).__name__} at {where}: {str(error)[:200]}"
        return "loads"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(
    readers: list[Reader],
    seed: int,
    seconds: float = math.inf,
    inputs: int | None = None,
    first: int = 0,
    keep: Path = Path(".fuzz"),
) -> int:
    """Run the readers in turn; prints what came of it. Returns how many inputs failed."""
    outcomes = {reader.name: Counter[str]() for reader in readers}
    failures: dict[str, str] = {}
    failed = 0
    end = time.monotonic() + seconds
    number = first
    with tempfile.TemporaryDirectory() as place:
        while time.monotonic() < end and (inputs is None or number < first + inputs):
            for reader in readers:
                files = make_input(reader, seed, number)
                outcome = try_input(reader, files, Path(place))
                if number == 0 and outcome != "loads":
                    outcome = f"FAILED: the whole file ends in {outcome}"
                outcomes[reader.name][outcome.partition(":")[0]] += 1
                if not outcome.startswith("FAILED"):
                    continue
                failed += 1
                again = f"--readers {reader.name} --seed {seed} --first {number} --inputs 1"
                kind = re.sub(r"\d+", "N", f"{reader.name}: {outcome}")
                if kind not in failures and len(failures) < 50:
                    failures[kind] = again
                    kept = keep / f"{reader.name}-{seed}-{number}"
                    kept.mkdir(parents=True, exist_ok=True)
                    for name, data in files.items():
                        (kept / name).write_bytes(data)
                    print(f"{reader.name}: {outcome}")
                    print(f"    kept in {kept}; again: python tests/fuzz.py {again}")
            number += 1
    for name, counts in outcomes.items():
        ended = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        print(f"{name:<14}{sum(counts.values()):>8}  {ended}")
    total = sum(sum(counts.values()) for counts in outcomes.values())
    print(f"{total} inputs of seed {seed}, {failed} failed in {len(failures)} ways")
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="how long to go on")
    parser.add_argument("--inputs", type=int, help="inputs for each reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--readers", default=",".join(READERS), help="default: all")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"), help="where failing inputs go")
    options = parser.parse_args(argv)
    names = options.readers.split(",")
    if unknown := set(names) - set(READERS):
        parser.error(
            f"no such reader: {', '.join(sorted(unknown))}; there are {', '.join(READERS)}"
        )
    if options.inputs is None and math.isinf(options.seconds):
        options.seconds = 60
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    readers = [READERS[name] for name in names]
    failed = fuzz(readers, seed, options.seconds, options.inputs, options.first, options.keep)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
