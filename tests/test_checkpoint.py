"""Weights files: read what others wrote, write what others read, refuse what nobody should.

The oracles are safetensors, Flax, numpy, torch, Transformers 4.57.6 and huggingface_hub.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import flax.traverse_util
import huggingface_hub
import huggingface_hub.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch
from checkpoint_files import _arrays, _assert_same, _dtype, _peak, _torch_tensors, _tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_common.errors import CheckpointError, InputError, MissingFileError, ViTError
from vit_common.files import texts
from vit_common.files.checkpoint import (
    make_directory,
    open_checkpoint,
    parse_size,
    read_json,
    save_checkpoint,
    shard_names,
    write_text,
)
from vit_common.files.containers.safetensors_file import CODES

# -- telling the containers apart


def test_the_content_decides_over_the_extension(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3.0)}
    (flax_file,) = save_checkpoint(tmp_path, arrays, container="msgpack")
    (safe_file,) = save_checkpoint(tmp_path, arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    torch.save({"a": torch.arange(3.0).double()}, tmp_path / "x.pth")
    sources = [flax_file, safe_file, tmp_path / "x.npz", tmp_path / "x.pth"]
    kinds = ["msgpack", "safetensors", "npz", "torch"]
    for source, kind in zip(sources, kinds, strict=True):
        for name in ("plain", "y.bin", "y.safetensors", "y.msgpack", "y.npz"):
            source.rename(tmp_path / name)
            with open_checkpoint(tmp_path / name) as checkpoint:
                assert checkpoint.container == kind
                _assert_same(checkpoint, arrays)
            (tmp_path / name).rename(source)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 346293852\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "this file is empty"),
        (POINTER, "a git-lfs pointer.*git lfs pull"),
        (b"\x89HDF\r\n\x1a\n", "a TensorFlow or Keras file"),
        (b"<!DOCTYPE html><html>", "not a weights file of a known kind"),
        (b"\n <HTML><head>", r"this is a web page \(HTML\)\. Download the file itself"),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "weights").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "weights")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere.*No such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="wanted a file; this is a directory"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingFileError, match="wanted a file; this is a directory or a device"):
        open_checkpoint(tmp_path / "pipe")


def test_reading_needs_no_framework(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": np.ones(2)})
    save_checkpoint(tmp_path, {"a": np.ones(2)}, container="msgpack")
    np.savez(tmp_path / "model.npz", a=np.ones(2))
    code = (
        "import sys; from vit_common.files.checkpoint import open_checkpoint, save_checkpoint\n"
        "for kind in ('safetensors', 'msgpack', 'npz'):\n"
        "    open_checkpoint(f'{sys.argv[1]}/model.{kind}')['a'].read()\n"
        "heavy = {'torch', 'jax', 'flax', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


# -- shards and their index


def _sharded(directory: Path, container: str = "safetensors") -> tuple[dict, Path]:
    rng = np.random.default_rng(1)
    arrays = {f"a/w{i}": rng.standard_normal((4, i + 1)).astype(np.float32) for i in range(6)}
    written = save_checkpoint(
        directory, arrays, container=container, max_shard_size=160, separator="/"
    )
    return arrays, written[-1]


@pytest.mark.parametrize("container", ["safetensors", "msgpack"])
def test_shards_are_read(tmp_path: Path, container: str) -> None:
    arrays, index = _sharded(tmp_path, container)
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.container == container
        assert checkpoint.path == index
        assert len(checkpoint.files) == len(shard_names(index)) == 3
        _assert_same(checkpoint, arrays)
    assert checkpoint.files[0].name == f"model-00001-of-00003.{container}"


def test_shards_in_a_hub_cache_are_links_out_of_the_folder(tmp_path: Path) -> None:
    arrays, index = _sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in index.parent.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with open_checkpoint(snapshot / index.name) as checkpoint:
        _assert_same(checkpoint, arrays)


def test_torch_shards_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": names}))
    with open_checkpoint(index) as checkpoint:
        _assert_same(checkpoint, {"a": np.ones(2, "f4"), "b": np.zeros(3, "f4")})


def _edit_index(index: Path, change: Callable[[dict], object]) -> None:
    table = json.loads(index.read_text())
    change(table["weight_map"])
    index.write_text(json.dumps(table))


def test_every_fault_of_an_index_is_named_at_once(tmp_path: Path) -> None:
    _, index = _sharded(tmp_path)
    first, second, third = shard_names(index)
    (tmp_path / third).unlink()
    _edit_index(index, lambda names: (names.pop("a/w0"), names.update({"ghost": second})))
    with pytest.raises(CheckpointError) as info:
        open_checkpoint(index)
    text = str(info.value)
    assert text.startswith(f"{index}: ")
    assert f"shard {first} holds tensors not in the index: 'a/w0'" in text
    assert f"shard {second} lacks 'ghost'" in text
    assert f"shard {third} of 1 tensors: {tmp_path / third}: cannot be read (No such file" in text


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    arrays, index = _sharded(tmp_path)
    first, second, _ = shard_names(index)
    both = {name: arrays[name] for name in [*shard_names(index)[second], "a/w0"]}
    safetensors.numpy.save_file(both, tmp_path / second)
    with pytest.raises(CheckpointError, match=f"shard {second} repeats from {first}: 'a/w0'"):
        open_checkpoint(index)


def test_shards_of_different_kinds_are_refused(tmp_path: Path) -> None:
    _, index = _sharded(tmp_path)
    shard = next(iter(shard_names(index)))
    names = shard_names(index)[shard]
    arrays = {name: open_checkpoint(tmp_path / shard)[name].read() for name in names}
    np.savez(tmp_path / "x.npz", **arrays)
    (tmp_path / "x.npz").rename(tmp_path / shard)
    with pytest.raises(CheckpointError, match="different kinds: npz, safetensors"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "..", "", ".", "a/b", "a\\b", "C:x", "a\x00b"]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    save_checkpoint(tmp_path, {"a": np.ones(1)}, stem="x")
    index = tmp_path / "sub" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must have a `weight_map`"),
        ('{"weight_map": []}', "must have a `weight_map`"),
        ('{"weight_map": {}}', "must have a `weight_map`"),
        ('{"weight_map": {"a": 1}}', "'a' must map to a file name; given 1"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' twice"),
        ('{"weight_map": ', "not valid JSON: .* at line 1"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(index)


# -- writing


def _as_in_transformers(arrays: dict, limit: int) -> tuple[dict, dict | None]:
    from transformers.modeling_flax_utils import flax_shard_checkpoint

    return flax_shard_checkpoint(_tree(arrays), limit)


@pytest.mark.parametrize("limit", [10_000, 300, 200, 130, 64])
def test_flax_shards_are_those_of_transformers(tmp_path: Path, limit: int) -> None:
    from transformers.modeling_flax_utils import FlaxPreTrainedModel

    rng = np.random.default_rng(2)
    arrays = {
        f"encoder/layer/{i}/kernel": rng.standard_normal((i % 4 + 1, 16)).astype(np.float32)
        for i in range(8)
    }
    written = save_checkpoint(
        tmp_path, arrays, container="msgpack", stem="flax_model", max_shard_size=limit
    )
    shards, index = _as_in_transformers(arrays, limit)
    assert [path.name for path in written[: len(shards)]] == list(shards)
    for name, shard in shards.items():
        expected = flax.serialization.to_bytes(flax.traverse_util.unflatten_dict(shard, sep="/"))
        assert (tmp_path / name).read_bytes() == expected
    if index is not None:
        path = tmp_path / "flax_model.msgpack.index.json"
        assert written[-1] == path
        assert path.read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"
    if limit == 300:
        loaded = FlaxPreTrainedModel.load_flax_sharded_weights(written[:-1])
        for name, array in flax.traverse_util.flatten_dict(loaded, sep="/").items():
            np.testing.assert_array_equal(array, arrays[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in written)


def test_no_empty_first_shard(tmp_path: Path) -> None:
    """Transformers writes an empty shard where the first tensor alone exceeds the limit."""
    arrays = {"a": np.ones(9), "b": np.ones(2)}
    assert next(iter(_as_in_transformers(arrays, 40)[0].values())) == {}
    written = save_checkpoint(tmp_path, arrays, container="msgpack", max_shard_size=40)
    assert [path.name for path in written[:2]] == [
        *("model-00001-of-00002.msgpack", "model-00002-of-00002.msgpack")
    ]


@pytest.mark.parametrize("limit", [10_000, 300, 200, 130, 64])
def test_safetensors_shards_are_those_of_huggingface_hub(tmp_path: Path, limit: int) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        f"layer.{i}": rng.standard_normal((i % 5 + 1, 16)).astype(np.float32) for i in range(8)
    }
    written = save_checkpoint(tmp_path, arrays, max_shard_size=limit, metadata={"format": "pt"})
    expected = huggingface_hub.serialization.split_state_dict_into_shards_factory(
        arrays,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for name, names in expected.filename_to_tensors.items():
        shard = {tensor: arrays[tensor] for tensor in names}
        assert (tmp_path / name).read_bytes() == safetensors.numpy.save(shard, {"format": "pt"})
    if expected.is_sharded:
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index == {
            "metadata": {"total_size": expected.metadata["total_size"]},
            "weight_map": expected.tensor_to_filename,
        }
    assert len(written) == len(expected.filename_to_tensors) + expected.is_sharded


@pytest.mark.parametrize("container", ["safetensors", "msgpack"])
def test_no_file_of_an_earlier_save_is_left(tmp_path: Path, container: str) -> None:
    old = {f"old{i}": np.ones(100) for i in range(4)}
    others = ["config.json", "model.safetensors.txt", "notes-00001.txt"]
    others += [f"{stem}-00001-of-00002.{container}" for stem in ("my-model", "model2")]
    for name in others:
        (tmp_path / name).write_text("mine")
    save_checkpoint(tmp_path, old, container=container, max_shard_size=800)
    save_checkpoint(tmp_path, old, container=container, max_shard_size=1600)
    names = {path.name for path in tmp_path.iterdir()} - {*others}
    assert names == {
        *(f"model-0000{i}-of-00002.{container}" for i in (1, 2)),
        f"model.{container}.index.json",
    }
    save_checkpoint(tmp_path, {"new": np.ones(3)}, container=container)
    assert {path.name for path in tmp_path.iterdir()} == {*others, f"model.{container}"}
    save_checkpoint(tmp_path, old, container=container, max_shard_size=800)
    assert f"model.{container}" not in {path.name for path in tmp_path.iterdir()}


def test_another_format_is_replaced_where_asked(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.ones(100) for i in range(4)}
    save_checkpoint(tmp_path, arrays, max_shard_size=800)
    save_checkpoint(tmp_path, arrays, container="msgpack", stem="flax_model")
    assert (tmp_path / "model.safetensors.index.json").exists()
    save_checkpoint(
        tmp_path, arrays, container="msgpack", stem="flax_model", replaces=["model.safetensors"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["flax_model.msgpack"]


def test_what_goes_beside_the_weights_is_replaced_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"config.json": "{}\n", "note.md": "ü"}
    written = save_checkpoint(tmp_path, {"a": np.ones(2)}, beside=beside)
    assert [path.name for path in written] == ["model.safetensors", "config.json", "note.md"]
    assert (tmp_path / "note.md").read_bytes() == "ü".encode()
    old, fsync, calls = _state(tmp_path), os.fsync, iter(range(10))

    def full(descriptor: int) -> None:
        if next(calls) == 1:  # the weights are on the disk, the configuration is not
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MissingFileError, match=r"config\.json: cannot be written \(No space"):
        save_checkpoint(tmp_path, {"a": np.zeros(2)}, beside={"config.json": '{"new": 1}'})
    assert _state(tmp_path) == old


def test_jax_arrays_and_tensors_of_other_files_are_written(tmp_path: Path) -> None:
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    (path,) = save_checkpoint(tmp_path, arrays)
    with open_checkpoint(path) as checkpoint:
        (copy,) = save_checkpoint(tmp_path / "copy", checkpoint)
        # Into the very file it is read from: the old one stays open until it is replaced.
        assert save_checkpoint(tmp_path, checkpoint) == [path]
    assert copy.read_bytes() == path.read_bytes()
    assert path.read_bytes() == safetensors.numpy.save(
        {name: np.asarray(array) for name, array in arrays.items()}
    )


def test_a_few_tensors_at_a_time_are_in_memory(tmp_path: Path) -> None:
    class Lazy:
        shape, dtype = (1_000_000,), np.dtype(np.uint8)

        def read(self) -> np.ndarray:
            return np.zeros(self.shape, self.dtype)

    for container in ("safetensors", "msgpack"):
        tensors = {f"w{i}": Lazy() for i in range(12)}
        peak = _peak(lambda c=container, t=tensors: save_checkpoint(tmp_path, t, container=c))
        assert peak < 7_500_000  # of 1 MB: one being turned, up to four that wait, one written


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({3: np.ones(1)}, {}, "name must be a string; given 3"),
        ({"a": 1.5}, {}, "'a' must be a numpy or JAX array; given a float"),
        ({"a": torch.ones(1)}, {}, "'a' must be a numpy or JAX array; given a Tensor"),
        ({"a": np.array(["x"])}, {}, "'a' has dtype <U1; wanted one of"),
        ({"a": np.array([None])}, {}, "'a' has dtype object"),
        ({"a": np.zeros(1, np.complex128)}, {}, "safetensors has no dtype complex128"),
        ({"a": np.zeros(1, ml_dtypes.int4)}, {}, "'a' has dtype int4"),
        ({"__metadata__": np.ones(1)}, {}, "name '__metadata__' is taken"),
        ({"a/b": np.ones(1), "a.b": np.ones(1)}, {}, "name 'a.b' is taken"),
        ({"\udcff": np.ones(1)}, {}, "not valid Unicode"),
        ({"a": np.ones(1), "a/b": np.ones(1)}, {"container": "msgpack"}, "through the tensor 'a'"),
        ({"a/b": np.ones(1), "a": np.ones(1)}, {"container": "msgpack"}, "paths lead through it"),
        ({}, {"container": "zip"}, "`container` must be one of 'safetensors', 'msgpack'"),
        ({}, {"stem": "../x"}, "`stem` must be a plain file name"),
        ({}, {"metadata": {"a": 1}}, "`metadata` must map strings to strings"),
        ({}, {"max_shard_size": "ten"}, "`max_shard_size` must be .* given 'ten'"),
    ],
)
def test_what_cannot_be_written_is_named_before_anything_is(
    tmp_path: Path, tensors: dict, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path / "new", tensors, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", ["10GB", "300KB", "5MB", "1.5 MB", "7 gb", "2TB", "0.5GB", "10kb"])
def test_sizes_are_those_of_huggingface_hub(size: str) -> None:
    from huggingface_hub.serialization._base import parse_size_to_int

    assert parse_size(size) == parse_size_to_int(size)


@pytest.mark.parametrize("size", ["1MiB", "3GiB", "12KiB", 7])
def test_sizes_are_those_of_transformers(size: str | int) -> None:
    from transformers.utils.hub import convert_file_size_to_int

    assert parse_size(size) == convert_file_size_to_int(size)


@pytest.mark.parametrize("size", ["", "GB", "1..5GB", "5XB", "-5GB", "0GB", 0, -1, 1.5, True, None])
def test_a_bad_size_is_refused(size: object) -> None:
    with pytest.raises(InputError, match="`max_shard_size` must be a positive number of bytes"):
        parse_size(size)  # type: ignore[arg-type]


# -- failures while writing


def _save_old(directory: Path) -> dict[str, bytes]:
    save_checkpoint(directory, {f"w{i}": np.full(100, i) for i in range(3)}, max_shard_size=800)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _state(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _new() -> dict[str, np.ndarray]:
    return {f"w{i}": np.full(100, 9.0) for i in range(3)}


@pytest.mark.parametrize("container", ["safetensors", "msgpack"])
def test_a_full_disk_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    save_checkpoint(tmp_path, _new(), container=container)
    old = _state(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = (
        rf"model\.{container}: cannot be written \(No space left on device\); the file .* kept"
    )
    with pytest.raises(MissingFileError, match=message):
        save_checkpoint(tmp_path, {"w": np.zeros(5000)}, container=container)
    assert _state(tmp_path) == old


def test_a_real_limit_on_file_size_leaves_the_old_files(tmp_path: Path) -> None:
    old = _save_old(tmp_path)
    code = (
        "import resource, sys, numpy as np\n"
        "from vit_common.files.checkpoint import save_checkpoint\n"
        "from vit_common.errors import MissingFileError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "for container in ('safetensors', 'msgpack'):\n"
        "    big = {'a': np.zeros(100), 'b': np.zeros(100_000)}\n"
        "    for size in ('10GB', 1000):\n"
        "        try:\n"
        "            save_checkpoint(sys.argv[1], big, container=container, max_shard_size=size)\n"
        "        except MissingFileError as error:\n"
        "            assert 'File too large' in str(error), error\n"
        "        else:\n"
        "            sys.exit('was written')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert _state(tmp_path) == old


def test_a_tensor_that_cannot_be_read_leaves_the_old_files(tmp_path: Path) -> None:
    old = _save_old(tmp_path)
    (source,) = save_checkpoint(tmp_path / "source", _new())
    with open_checkpoint(source) as checkpoint:
        os.truncate(source, 100)
        with pytest.raises(CheckpointError, match="was truncated"):
            save_checkpoint(tmp_path, checkpoint, max_shard_size=800)
    source.unlink()
    source.parent.rmdir()
    assert _state(tmp_path) == old

    class Liar:
        shape, dtype = (3,), np.dtype(np.float32)

        def read(self) -> np.ndarray:
            return np.zeros(4, np.float32)

    with pytest.raises(InputError, match=r"'a' said float32 of shape \(3,\); reading it gave"):
        save_checkpoint(tmp_path, {"a": Liar()})
    assert _state(tmp_path) == old


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failure_between_the_renames_puts_the_old_files_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_exchange: None, failing: int
) -> None:
    old = _save_old(tmp_path)
    replace, calls = os.replace, iter(range(1, 100))

    def fail_once(source: Path, target: Path) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(MissingFileError, match="Input/output error"):
        save_checkpoint(tmp_path, _new(), max_shard_size=800)
    assert _state(tmp_path) == old


def test_new_files_go_again_after_a_failure_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_exchange: None
) -> None:
    replace, calls = os.replace, iter(range(1, 100))

    def fail_once(source: Path, target: Path) -> None:
        if next(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(MissingFileError, match=r"\(Input/output error\)"):
        save_checkpoint(tmp_path, _new(), max_shard_size=800)
    assert _state(tmp_path) == {}


def test_an_interrupt_leaves_the_old_files(tmp_path: Path) -> None:
    old = _save_old(tmp_path)

    class Slow:
        shape, dtype = (3,), np.dtype(np.float32)

        def read(self) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"a": np.ones(3), "b": Slow()})
    assert _state(tmp_path) == old


def test_a_directory_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(MissingFileError, match=r"model\.safetensors.*a directory has that name"):
        save_checkpoint(tmp_path, _new())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.json", "{}")
        (path,) = save_checkpoint(tmp_path, _new())
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert path.stat().st_mode & 0o777 == 0o640


# -- JSON, text and directories


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", '{"é": 1}\n')
    assert (tmp_path / "a.json").read_bytes() == '{"é": 1}\n'.encode()
    assert read_json(tmp_path / "a.json") == {"é": 1}
    write_text(str(tmp_path / "a.json"), "{}")
    assert read_json(str(tmp_path / "a.json")) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_text_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"a\.json: cannot be .*No such file.*nothing"):
        write_text(tmp_path / "nowhere" / "a.json", "{}")
    write_text(tmp_path / "a.json", "{}")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MissingFileError, match=r"No space left on device.*the file .* is kept"):
        write_text(tmp_path / "a.json", '{"new": 1}')
    assert _state(tmp_path) == {"a.json": b"{}"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON: Expecting value at line 1, column 1"),
        (b'{\n "a": 1,\n "b" 2\n}', "not valid JSON: .* at line 3, column 6"),
        (b"[1, 2]", r"must be an object \{...\}; given a list"),
        (b"null", "given a NoneType"),
        (b'{"a":\n "\xff"}', "not UTF-8 at line 2"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (POINTER, "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>", r"not valid JSON: this is a web page \(HTML\)"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as info:
        read_json(path)
    assert str(path) in str(info.value)


def test_json_that_is_not_there_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingFileError, match=r"config\.json: cannot be read \(No such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(MissingFileError, match="Is a directory"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')  # with a byte order mark
    assert read_json(tmp_path / "a.json") == {"a": 1}
    monkeypatch.setattr(texts, "MAX_JSON_BYTES", 5)
    with pytest.raises(CheckpointError, match="larger than any JSON file"):
        read_json(tmp_path / "a.json")


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_directory(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert make_directory(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingFileError, match="file: wanted a directory; a file has that name"):
        make_directory(tmp_path / "file")
    with pytest.raises(MissingFileError, match=r"cannot be made a directory \(Not a directory\)"):
        make_directory(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MissingFileError, match="cannot be written"):
        make_directory(tmp_path / "a")


# -- anything at all


def _originals(directory: Path) -> dict[str, bytes]:
    arrays = _arrays(["float32", "bfloat16", "bool"])
    (safe,) = save_checkpoint(directory, arrays)
    (packed,) = save_checkpoint(directory, arrays, container="msgpack")
    native = {name: array for name, array in arrays.items() if array.dtype.isbuiltin == 1}
    np.savez(directory / "a.npz", **native)
    np.savez_compressed(directory / "b.npz", **native)
    tensors = {"model": _torch_tensors(), "epoch": 3}
    torch.save(tensors, directory / "a.bin")
    torch.save(tensors, directory / "b.bin", _use_new_zipfile_serialization=False)
    names = [safe.name, packed.name, "a.npz", "b.npz", "a.bin", "b.bin"]
    return {name: (directory / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return _originals(tmp_path_factory.mktemp("originals"))


def _read_or_refuse(path: Path) -> None:
    refusal: ViTError | None = None
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.values():
                array = tensor.read()
                assert array.shape == tensor.shape
                assert array.dtype == tensor.dtype
    except ViTError as error:
        refusal = error
    assert refusal is None or str(path) in str(refusal)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.msgpack", "a.npz", "b.npz", "a.bin", "b.bin"]
)
@settings(
    max_examples=40,
    deadline=10_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(
    originals: dict[str, bytes], tmp_path: Path, name: str, data: st.DataObject
) -> None:
    damaged = bytearray(originals[name])
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)), "end")
    del damaged[end:]
    # Headers lie at the front of some containers and at the back of others.
    places = st.integers(0, 400) | st.integers(0, len(originals[name])) | st.integers(-300, -1)
    for place, mask in data.draw(st.lists(st.tuples(places, st.integers(1, 255)), max_size=4)):
        if -len(damaged) <= place < len(damaged):
            damaged[place] ^= mask
    path = tmp_path / name
    path.write_bytes(damaged)

    assert _peak(lambda: _read_or_refuse(path)) < 20_000_000


@settings(
    max_examples=150,
    deadline=10_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=200), name=st.sampled_from(["a.safetensors", "a.msgpack", "a"]))
def test_random_bytes_are_read_or_refused(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    _read_or_refuse(tmp_path / name)


def test_every_dtype_of_the_library_has_its_place() -> None:
    """`CODES` is in the order the installed library stores arrays, which the bytes follow."""
    arrays = {name: np.zeros(1, _dtype(name)) for name in CODES}
    data = safetensors.numpy.save(arrays)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header) == list(CODES)
    assert {name: entry["dtype"] for name, entry in header.items()} == CODES
