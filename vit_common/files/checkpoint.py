"""Weights files <-> a flat mapping of names to arrays.

Reads safetensors, Flax msgpack, numpy `.npz` and torch pickles (weights only), each as one file or
as shards with an index, and with h5py Keras's HDF5; writes each of the former as one file, and the
first two as shards. Reading is lazy, writing is atomic, and nothing a file says is executed or
allocated before it is checked against the file's real size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vit_common.errors import CheckpointError, InputError, MissingFileError, shown, some
from vit_common.files.containers import (
    flax_msgpack,
    hdf5_file,
    numpy_zip,
    orbax_folder,
    safetensors_file,
    torch_pickle,
)
from vit_common.files.containers.tensor import DataFile, Progress, Tensor, as_tensor, no_progress
from vit_common.files.replace import make_directory, replace_files, write_text
from vit_common.files.texts import cut, not_the_file, read_json

__all__ = [
    "Checkpoint",
    "Tensor",
    "make_directory",
    "open_checkpoint",
    "parse_size",
    "read_json",
    "save_checkpoint",
    "shard_names",
    "write_checkpoint",
    "write_text",
]

Container = Literal["safetensors", "msgpack", "npz", "torch", "orbax", "hdf5"]

_EXTENSIONS: dict[str, Container] = {
    ".safetensors": "safetensors",
    ".msgpack": "msgpack",
    ".npz": "npz",
    ".bin": "torch",
    ".pth": "torch",
    ".pt": "torch",
    ".ckpt": "torch",
}
_SAVED_AS = {"safetensors": "safetensors", "msgpack": "msgpack", "npz": "npz", "torch": "pth"}
INDEX_SUFFIX = ".index.json"
_SHOWN = 10
"""Faults named one by one in an error; the rest are counted."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one weights file, or of an index and its shards; nothing is loaded yet.

    Attributes:
        path: the file that was opened, an index where there is one.
        files: the files that hold the tensors.
        container: their format.
        metadata: what a safetensors file says of itself, such as {"format": "pt"}; else empty.
        left_out: entries of the files that are no arrays of numbers, such as a text or the
            arguments of a training: name -> what it is.
    """

    def __init__(
        self,
        path: Path,
        container: Container,
        tensors: dict[str, Tensor],
        metadata: dict[str, str],
        sources: list[DataFile],
    ) -> None:
        self.path = path
        self.container: Container = container
        self.metadata = metadata
        self.files = [source.path for source in sources]
        self.left_out = {n: what for source in sources for n, what in source.left_out.items()}
        self._tensors = tensors
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.container}, {len(self)} tensors)"

    def close(self) -> None:
        """Close the files. Arrays already read stay; tensors not read yet no longer can be."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | PathLike) -> Checkpoint:
    """Open a weights file, or the index (`*.index.json`) of a sharded one.

    The container is detected from the file's first bytes, else from its extension.

    Raises:
        MissingFileError: it cannot be read.
        CheckpointError: it is truncated, corrupt or hostile, in no known container, asks for code
            to be run, or an index and its shards contradict each other (every fault is named).
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    # os.path's, which takes a name that no file can have for that of none.
    if os.path.isdir(path) and (folder := orbax_folder.find(path)) is not None:
        checkpoint = Checkpoint(path, "orbax", orbax_folder.read(folder), {}, [])
        checkpoint.files = sorted(file for file in folder.rglob("*") if file.is_file())
        return checkpoint
    file = DataFile(path)
    try:
        container = _container_of(file)
        metadata: dict[str, str] = {}
        if container == "safetensors":
            tensors, metadata = safetensors_file.read(file)
        elif container == "msgpack":
            tensors = flax_msgpack.read(file)
        elif container == "npz":
            tensors = numpy_zip.read(file)
        elif container == "hdf5":
            tensors = hdf5_file.read(file)
        else:
            tensors = torch_pickle.read(file)
        if not tensors and file.left_out and container != "torch":
            name, what = next(iter(file.left_out.items()))
            raise file.fail(f"holds no array of numbers; {shown(name)} {what}.")
    except BaseException:
        file.close()
        raise
    return Checkpoint(path, container, tensors, metadata, [file])


def _container_of(file: DataFile) -> Container:
    head = file.read(0, 64)
    if not head:
        raise file.fail("this file is empty.")
    if (other := not_the_file(head, file.path, "a weights file of a known kind")) is not None:
        raise other
    if head.startswith(hdf5_file.MAGIC):
        return "hdf5"
    if head.startswith(torch_pickle.LEGACY_MAGIC):
        return "torch"
    if head.startswith(b"PK"):
        return "torch" if torch_pickle.is_torch_archive(file) else "npz"
    if safetensors_file.recognises(head):
        return "safetensors"
    if flax_msgpack.recognises(head):
        return "msgpack"
    by_name = _EXTENSIONS.get(file.path.suffix.lower())
    if by_name is not None:
        return by_name
    raise file.fail(
        "not a weights file of a known kind; wanted safetensors, Flax msgpack, numpy .npz or a "
        "torch pickle."
    )


def shard_names(index: str | PathLike) -> dict[str, list[str]]:
    """The shards an index names, each with the names of the tensors it should hold.

    Raises:
        MissingFileError: the index cannot be read.
        CheckpointError: it is not an index, or names a file outside its own folder.
    """
    path = Path(index)
    weight_map = read_json(path, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: an index must have a `weight_map` of tensor to file name.")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{path}: {shown(name)} must map to a file name; given {shown(shard)}."
            )
        shards.setdefault(shard, []).append(name)
    # A snapshot in the Hub's cache is made of links out of it, so a link is no fault; a name is.
    outside = [s for s in shards if not s or s in (".", "..") or re.search(r"[/\\:\x00]", s)]
    if outside:
        raise CheckpointError(
            f"{path}: names shards outside its own folder: {_some(outside)}; wanted plain names."
        )
    return shards


def _open_shards(path: Path) -> Checkpoint:
    shards = shard_names(path)
    opened: list[Checkpoint] = []
    faults: list[str] = []
    owner: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    try:
        for shard, expected in shards.items():
            try:
                part = open_checkpoint(path.parent / shard)
            except MissingFileError as error:
                faults.append(f"shard {shard[:200]} of {len(expected)} tensors: {cut(str(error))}")
                continue
            opened.append(part)
            wanted = set(expected)
            missing = [name for name in expected if name not in part]
            extra = [name for name in part if name not in wanted]
            twice = [name for name in part if name in owner]
            if missing:
                faults.append(f"shard {shard} lacks {_some(missing)}")
            if twice:
                faults.append(f"shard {shard} repeats from {owner[twice[0]]}: {_some(twice)}")
            if extra and not twice:
                faults.append(f"shard {shard} holds tensors not in the index: {_some(extra)}")
            owner.update(dict.fromkeys(part, shard))
            tensors.update(part)
            metadata = {**part.metadata, **metadata}
        kinds = {part.container for part in opened}
        if len(kinds) > 1:
            faults.append(f"its shards are of different kinds: {', '.join(sorted(kinds))}")
        if faults:
            raise CheckpointError(f"{path}: " + "; ".join(faults[:_SHOWN]) + ".")
    except BaseException:
        for part in opened:
            part.close()
        raise
    sources = [source for part in opened for source in part._sources]
    return Checkpoint(path, opened[0].container, tensors, metadata, sources)


def _some(names: Iterable[str]) -> str:
    return some(map(shown, names), _SHOWN)


# -- writing

_UNITS = {"": 1, "B": 1}
_UNITS |= {unit + "B": 1000**power for power, unit in enumerate("KMGT", 1)}
_UNITS |= {unit + "IB": 1024**power for power, unit in enumerate("KMGT", 1)}


def parse_size(size: int | str) -> int:
    """A size in bytes: an integer, or a number and a unit such as "10GB", "300KB" or "5MiB".

    Raises:
        InputError: it is neither, or less than one byte.
    """
    wanted = InputError(
        f"`max_shard_size` must be a positive number of bytes, or a text such as '10GB', '300KB' "
        f"or '5MiB'; given {size!r}."
    )
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise wanted
        try:
            size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
        except InvalidOperation as error:
            raise wanted from error
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise wanted
    return size


def save_checkpoint(
    directory: str | PathLike,
    tensors: Mapping[str, Any],
    *,
    container: Container = "safetensors",
    stem: str = "model",
    max_shard_size: int | str = "10GB",
    metadata: Mapping[str, str] | None = None,
    separator: str = ".",
    replaces: Iterable[str] = (),
    beside: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write tensors as `{stem}.{container}`, or as shards and an index where they are larger.

    Shards and index have the names and the content Transformers 4.57.6 gives them. Everything is
    written under temporary names first: after a failure the files of an earlier save are still
    there and whole, after success none of them is left.

    Args:
        directory: made if it is not there.
        tensors: name -> numpy array, JAX array, `Tensor`, or anything with `shape`, `dtype` and
            `read()`; each is read once, and one at a time is in memory. The parts of a nested
            name are joined with "/".
        container: "safetensors" or "msgpack"; "npz" and "torch" are never sharded.
        stem: the files' name without extension; Transformers has "model" and "flax_model".
        max_shard_size: largest file, as `parse_size` takes it; a larger tensor gets a file alone.
        metadata: texts for the header of safetensors files, such as {"format": "pt"}.
        separator: what stands for "/" in the names of a safetensors file.
        replaces: names of other weights files, such as "flax_model.msgpack", that this save makes
            stale: they, their shards and their indices are deleted at the end.
        beside: other files of this save, such as "config.json": name -> text.
        progress: called with the number of bytes of each tensor when it has been written.

    Returns:
        The files written: weights, index, and what goes beside them.

    Raises:
        InputError: a name, a dtype or a value the container cannot hold.
        MissingFileError: the directory cannot be written, or the disk is full.
    """
    if container not in _SAVED_AS:
        known = ", ".join(map(repr, _SAVED_AS))
        raise InputError(f"`container` must be one of {known}; given {container!r}.")
    if not re.fullmatch(r"[\w.-]+", stem):
        raise InputError(f"`stem` must be a plain file name without extension; given {stem!r}.")
    limit = parse_size(max_shard_size)
    entries = _entries(tensors, container, separator)
    texts = _texts(metadata)

    single = f"{stem}.{_SAVED_AS[container]}"
    whole = container not in ("safetensors", "msgpack")
    shards = [entries] if whole else _split(entries, limit, container)
    contents: dict[str, Callable[[BinaryIO], object]] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = single
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.{_SAVED_AS[container]}"
        contents[name] = _writer(container, shard, texts, None, progress)
        weight_map.update({tensor.name: name for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        contents[single + INDEX_SUFFIX] = partial(_write_text, text=text)
    for name, content in (beside or {}).items():
        contents[name] = partial(_write_text, text=content)

    directory = make_directory(directory)
    stale = [
        file.name
        for file in directory.iterdir()
        if file.name not in contents and any(_belongs(file.name, to) for to in (single, *replaces))
    ]
    return replace_files(directory, contents, sorted(stale))


def write_checkpoint(
    path: str | PathLike,
    tensors: Mapping[str, Any],
    *,
    container: Container | None = None,
    metadata: Mapping[str, str] | None = None,
    wrapper: str | None = None,
    separator: str = "/",
    progress: Progress | None = None,
) -> None:
    """Write tensors as one file; whatever happens, the old file or the whole new one is there.

    A process that is killed can leave a hidden folder `.{name}.{8 characters}.tmp` beside the old
    file; the next one that writes the same file deletes it.

    Args:
        path: the file; its directory is made if it is not there.
        tensors: name -> numpy array, JAX array, `Tensor`, or anything with `shape`, `dtype` and
            `read()`. Each is read once, and one at a time is in memory; but "torch" holds all.
        container: "safetensors", "msgpack", "npz" or "torch"; by default what the suffix says.
        metadata: texts for the header of a safetensors file, such as {"format": "pt"}.
        wrapper: writes a torch pickle of {wrapper: {name: tensor}}, as {"model": {...}}.
        separator: what stands for "/" in the names; a msgpack file nests them instead.
        progress: called with the number of bytes of each tensor when it has been written, or for
            "torch", which writes them all at the end, when it is in memory.

    Raises:
        InputError: no such container or suffix, or one that cannot hold a name, a dtype, a value,
            metadata or a wrapper; torch is not installed.
        MissingFileError: the file cannot be written, or the disk is full.
    """
    path = Path(path)
    if container is None:
        container = _EXTENSIONS.get(path.suffix.lower())
        if container is None:
            raise InputError(
                f"{path}: the suffix must be one of {', '.join(_EXTENSIONS)}, or `container` say "
                f"what to write; given {path.suffix!r}."
            )
    elif container not in _EXTENSIONS.values():
        known = ", ".join(map(repr, dict.fromkeys(_EXTENSIONS.values())))
        raise InputError(f"`container` must be one of {known}; given {container!r}.")
    if metadata and container != "safetensors":
        raise InputError(f"`metadata` is for safetensors files; {path} is to be {container}.")
    if wrapper is not None and (container != "torch" or not isinstance(wrapper, str)):
        raise InputError(
            f"`wrapper` must be a string, and is for torch pickles; given {wrapper!r}, and {path} "
            f"is to be {container}."
        )
    entries = _entries(tensors, container, separator)
    write = _writer(container, entries, _texts(metadata), wrapper, progress)
    replace_files(make_directory(path.parent), {path.name: write})


def _writer(
    container: Container,
    tensors: list[Tensor],
    metadata: dict[str, str],
    wrapper: str | None,
    progress: Progress | None,
) -> Callable[[BinaryIO], object]:
    """What writes these tensors to a stream; what can be refused without reading them is."""
    told = progress or no_progress
    if container == "safetensors":
        return partial(safetensors_file.write, tensors=tensors, metadata=metadata, progress=told)
    if container == "msgpack":
        return partial(flax_msgpack.write, tree=flax_msgpack.nest(tensors), progress=told)
    if container == "npz":
        return partial(numpy_zip.write, tensors=tensors, progress=told)
    return partial(torch_pickle.write, tensors=tensors, wrapper=wrapper, progress=told)


def _texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    texts = dict(metadata or {})
    if not all(isinstance(part, str) for pair in texts.items() for part in pair):
        raise InputError(f"`metadata` must map strings to strings; given {texts!r}.")
    return texts


def _write_text(stream: BinaryIO, text: str) -> None:
    stream.write(text.encode())


_LONGEST_NAME = {
    "msgpack": flax_msgpack.MAX_NAME,
    "npz": numpy_zip.MAX_NAME,
    "torch": torch_pickle.MAX_NAME,
}
"""Bytes of a name, of what is read again here."""


def _entries(tensors: Mapping[str, Any], container: str, separator: str) -> list[Tensor]:
    """The tensors under the names they are written with, checked."""
    entries: dict[str, Tensor] = {}
    for given, value in tensors.items():
        if not isinstance(given, str):
            raise InputError(f"a tensor's name must be a string; given {given!r}.")
        name = given if container == "msgpack" else given.replace("/", separator)
        try:
            length = len(name.encode())
        except UnicodeEncodeError as error:
            raise InputError(f"tensor {given!r}: its name is not valid Unicode.") from error
        if length > _LONGEST_NAME.get(container, length):
            raise InputError(
                f"tensor {given[:80]!r}...: its name takes {length} bytes; {container} files hold "
                f"at most {_LONGEST_NAME[container]}."
            )
        if container == "npz" and "\0" in name:
            raise InputError(f"tensor {given!r}: npz has no names with a NUL in them.")
        if name in entries or (container == "safetensors" and name == "__metadata__"):
            raise InputError(f"tensor {given!r}: the name {name!r} is taken.")
        entry = as_tensor(name, value)
        if container == "safetensors" and entry.dtype.name not in safetensors_file.CODES:
            raise InputError(f"tensor {given!r}: safetensors has no dtype {entry.dtype.name}.")
        if container == "npz" and not numpy_zip.holds(entry.dtype):
            raise InputError(f"tensor {given!r}: npz has no dtype {entry.dtype.name}.")
        entries[name] = entry
    return list(entries.values())


def _split(entries: list[Tensor], limit: int, container: str) -> list[list[Tensor]]:
    """Shards in the order of the tensors, as the two libraries cut them.

    Flax files as `flax_shard_checkpoint` of Transformers (without the empty first shard it makes
    when the first tensor is too large); safetensors as `huggingface_hub`, where a tensor that is
    too large by itself does not end the shard before it.
    """
    shards: list[list[Tensor]] = []
    current: list[Tensor] = []
    size = 0
    for entry in entries:
        if container == "safetensors" and entry.nbytes > limit:
            shards.append([entry])
            continue
        if current and size + entry.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(entry)
        size += entry.nbytes
    return [*shards, current] if current or not shards else shards


def _belongs(file_name: str, single: str) -> bool:
    """Whether a file is that weights file, a shard of it or its index."""
    stem, dot, extension = single.rpartition(".")
    shard = rf"{re.escape(stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(dot + extension)}"
    return file_name in (single, single + INDEX_SUFFIX) or bool(re.fullmatch(shard, file_name))
