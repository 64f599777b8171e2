"""Exported models: one file with a program for several platforms, its parameters, preprocessing and
labels. Reading one needs JAX (with flatbuffers), numpy and Pillow, not Flax.

The file is a zip archive without compression, so that nothing unpacks to more than it is:

- `program.bin`: what `jax.export.Exported.serialize` gives. It takes a flat dict of the parameters
  and the images, and gives the logits. No weight is in it.
- `parameters.safetensors`: the parameters under the names the program takes them by.
- `metadata.json`: shapes, dtype, platforms, labels, versions. `config.json` and
  `preprocessor_config.json` are those of the model.
- `check.json`: what was measured before the file got its name; not there if nothing was.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_common.checks import check_positive
from vit_common.errors import CheckpointError, ConfigError, ImageError, InputError, MissingFileError
from vit_common.files.containers import safetensors_file
from vit_common.files.containers.tensor import DataFile
from vit_common.files.containers.zips import data_offset
from vit_common.files.texts import MAX_JSON_BYTES, cut, parse_json, reason, shown
from vit_common.images.auto import processor_from_dict
from vit_common.images.predictions import (
    AS_IN_A_PICTURE,
    Prediction,
    are_many,
    likeliest,
    prepare_image,
)
from vit_common.images.processor import BaseImageProcessor
from vit_common.versions import PACKAGE

KIND = "vit-flax export"
VERSION = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, PARAMETERS, METADATA = "program.bin", "parameters.safetensors", "metadata.json"
CONFIG, PROCESSOR, CHECK = "config.json", "preprocessor_config.json", "check.json"

_NEEDED = (PROGRAM, PARAMETERS, METADATA, CONFIG, PROCESSOR)
_BATCH = 32


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# field of the metadata -> whether a value is one that `export` writes
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "input_shape": lambda value: _are(lambda n: _is_number(n) and n > 0)(value) and len(value) == 3,
    "input_dtype": lambda value: value in ("float32", "uint8"),
    "output": lambda value: value in ("logits", "features"),
    "batch": lambda value: value == "dynamic" or (_is_number(value) and value > 0),
    "platforms": _are(_is_text),
    "calling_convention_version": _is_number,
    "labels": _are(_is_text),
    "several": lambda value: isinstance(value, bool),
    "versions": lambda value: isinstance(value, dict),
}


def platform_of(device: jax.Device) -> str:
    """The name of a device's platform in `jax.export`: "cpu", "cuda", "rocm" or "tpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


class ExportedModel:
    """An exported model that is loaded; `load` makes it.

    Attributes:
        path: the file.
        metadata: content of its `metadata.json`.
        check: the comparison made at export; None if there was none.
        config: the model's `config.json`, a dict.
        image_processor: prepares images.
        labels: name of each class; empty where the output is features.
        parameters: name -> array, on `device`.
        device: the device it runs on.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        check: Mapping[str, Any] | None,
        config: Mapping[str, Any],
        image_processor: BaseImageProcessor,
        parameters: Mapping[str, jax.Array],
        program: jax.export.Exported,
        device: jax.Device,
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.check = None if check is None else dict(check)
        self.config = dict(config)
        self.image_processor = image_processor
        self.labels: list[str] = list(metadata["labels"])
        self.parameters = dict(parameters)
        self.device = device
        self._run = jax.jit(program.call)

    @property
    def batch(self) -> int | str:
        """Number of images in a call, or "dynamic" for any number."""
        return self.metadata["batch"]

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platforms it was exported for."""
        return tuple(self.metadata["platforms"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        C, H, W = self.metadata["input_shape"]
        return C, H, W

    def __call__(self, pixel_values: Any) -> jax.Array:
        """Run the program.

        It is compiled once for each batch size.

        Args:
            pixel_values: (B, C, H, W), prepared as `image_processor` does; float32, or uint8 where
                it was exported so.

        Returns:
            float32 logits (B, K), or features (B, D).

        Raises:
            InputError: the shape or the dtype is not what was exported.
        """
        if not hasattr(pixel_values, "shape") or not hasattr(pixel_values, "dtype"):
            pixel_values = np.asarray(pixel_values)
        shape, dtype = tuple(pixel_values.shape), self.metadata["input_dtype"]
        given = f"given {pixel_values.dtype} of shape {shape}."
        batch = "any number" if self.batch == "dynamic" else self.batch
        wanted = f"{self.path}: `pixel_values` must be {dtype} of shape ({batch}, " + ", ".join(
            map(str, self.input_shape)
        )
        if len(shape) != 4 or shape[1:] != self.input_shape or shape[0] < 1:
            hint = " Add a batch dimension: `pixel_values[None]`." if len(shape) == 3 else ""
            raise InputError(f"{wanted}), (batch, channels, height, width); {given}{hint}")
        if self.batch not in ("dynamic", shape[0]):
            raise InputError(
                f"{wanted}); {given} Pad the batch, or export again with --batch dynamic (in "
                'Python `batch="dynamic"`).'
            )
        if str(pixel_values.dtype).removeprefix("torch.") != dtype:
            raise InputError(f"{wanted}); {given} Convert it: `.astype(numpy.{dtype})`.")
        return self._run(self.parameters, jax.device_put(pixel_values, self.device))

    def prepare(self, image: Any) -> np.ndarray:
        """One image as the program takes it, (C, H, W).

        Args:
            image: an image file (its name, its bytes, or open for reading), PIL image, or array as
                the image processor takes it.

        Raises:
            ImageError, MissingFileError: it cannot be read or taken.
        """
        raw = self.metadata["input_dtype"] == "uint8"
        options = AS_IN_A_PICTURE if raw else {}
        pixels = prepare_image(image, self.image_processor, self.input_shape, **options)
        if raw and pixels.dtype != np.uint8:
            raise ImageError(
                f"{self.path} takes pixels of 8 bits; given an array of {pixels.dtype}. Scale and "
                "round it to uint8."
            )
        return pixels.astype(self.metadata["input_dtype"], copy=False)

    def classify(self, images: Any, top_k: int = 5) -> Any:
        """Classify one image or a list of images.

        Args:
            images: an image file (its name, its bytes, or open for reading), PIL image or array; or
                a list of these, or an array (B, H, W, C) or (B, C, H, W).
            top_k: how many classes to return; all if there are fewer.

        Returns:
            A tuple of `Prediction`, best first; for a list, a list of these.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: `top_k` is not a positive integer, or the output is features.
        """
        if self.metadata["output"] != "logits":
            raise InputError(
                f"{self.path} gives {self.metadata['output']}, not logits, so it cannot classify; "
                "call it on `pixel_values`, or export a model with a classifier."
            )
        check_positive("top_k", top_k)
        many = are_many(images)
        sources = list(images) if many else [images]
        found: list[tuple[Prediction, ...]] = []
        # Fewer images than a batch: the next power of two, so that few sizes are ever compiled.
        size = min(_BATCH, 1 << max(0, len(sources) - 1).bit_length())
        size = self.batch if isinstance(self.batch, int) else size
        for start in range(0, len(sources), size):
            part = sources[start : start + size]
            pixels = np.zeros((size, *self.input_shape), self.metadata["input_dtype"])
            for i, source in enumerate(part):
                pixels[i] = self.prepare(source)
            for row in np.asarray(self(pixels))[: len(part)]:
                if not np.isfinite(row).all():
                    raise ImageError(f"{self.path}: its output is not finite (NaN or infinity).")
                found.append(likeliest(self._probabilities(row), self.labels, top_k))
        return found if many else found[0]

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        if self.metadata["several"]:
            return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()


def load(path: str | PathLike, *, device: jax.Device | None = None) -> ExportedModel:
    """Load a file that `export` wrote.

    Args:
        path: the file.
        device: where to run; None is JAX's default.

    Raises:
        MissingFileError: it is not there or cannot be read.
        CheckpointError: it is no such file, is truncated or corrupt, or was made by a version of
            JAX that this one cannot read.
        InputError: it was not exported for the platform of the device.
    """
    path = Path(path)
    with _Archive(path) as archive:
        metadata = archive.json(METADATA)
        _check_metadata(path, metadata)
        device = jax.devices()[0] if device is None else device
        platform, exported_for = platform_of(device), metadata["platforms"]
        if platform not in exported_for:
            names = ", ".join(exported_for)
            raise InputError(
                f"{path}: was exported for {names}; this would run on {platform}. Export it again "
                f"with --platforms {','.join([*exported_for, platform])}, or run it where JAX has "
                f"{names}."
            )
        program = _program(path, archive.read(PROGRAM), metadata)
        parameters = {
            name: jax.device_put(array, device) for name, array in archive.parameters().items()
        }
        _check_parameters(path, program, parameters)
        _check_outputs(path, program, metadata)
        try:
            image_processor = processor_from_dict(archive.json(PROCESSOR), path / PROCESSOR)
        except ConfigError as error:
            raise CheckpointError(cut(str(error))) from error
        check = archive.json(CHECK) if CHECK in archive.names else None
        config = archive.json(CONFIG)
    return ExportedModel(
        path, metadata, check, config, image_processor, parameters, program, device
    )


def serializer() -> Any:
    """JAX's module of exported programs, once what it reads and writes them with is there.

    Raises:
        InputError: it is not installed.
    """
    try:
        import flatbuffers  # noqa: F401  # JAX asks for it, but does not depend on it
    except ImportError as error:
        raise InputError(
            "exported programs need the package flatbuffers, which is not installed; run: pip "
            "install flatbuffers"
        ) from error
    import jax.export

    return jax.export


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    if metadata.get("kind") != KIND:
        raise _wrong(path)
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: is of version {shown(metadata.get('version'))} of this kind of file; this "
            f"package reads version {VERSION}. Install the {PACKAGE} that wrote it "
            f"({_versions(metadata, PACKAGE, 'vit-flax')}), or export it again."
        )
    for name, is_proper in _FIELDS.items():
        if name not in metadata or not is_proper(metadata[name]):
            raise CheckpointError(f"{path}: corrupt: {METADATA} has no proper {name!r}.")


def _program(path: Path, data: bytes, metadata: Mapping[str, Any]) -> Any:
    """The program; CheckpointError where this JAX cannot read it."""
    export = serializer()
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    number = metadata["calling_convention_version"]
    made_by = f"it was exported with JAX {_versions(metadata, 'jax')}; this is {jax.__version__}"
    if not oldest <= number <= newest:
        raise CheckpointError(
            f"{path}: its program has calling convention {number}, and this JAX reads {oldest} to "
            f"{newest} ({made_by}). Install that version of JAX, or export it again."
        )
    try:
        return export.deserialize(bytearray(data))
    except Exception as error:
        raise CheckpointError(
            f"{path}: its program cannot be read ({reason(error)[:200]}); {made_by}. Export it "
            "again."
        ) from error


def _versions(metadata: Mapping[str, Any], *names: str) -> str:
    """The version of a package that is recorded, under the first of its names that is there."""
    versions = metadata.get("versions")
    table = versions if isinstance(versions, dict) else {}
    return str(next((table[name] for name in names if name in table), "unknown"))


def _check_parameters(path: Path, program: Any, parameters: Mapping[str, Any]) -> None:
    (tree, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    wanted = {name: (aval.shape, aval.dtype) for name, aval in tree.items()}
    given = {name: (array.shape, array.dtype) for name, array in parameters.items()}
    if wanted != given:
        wrong = sorted(n for n in {*wanted, *given} if wanted.get(n) != given.get(n))
        raise CheckpointError(
            f"{path}: corrupt: its program and its parameters do not fit each other at "
            f"{', '.join(wrong[:5])}."
        )


def _check_outputs(path: Path, program: Any, metadata: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the program takes and gives what the metadata say."""
    images = program.in_avals[-1]  # after the parameters
    shape, dtype = [*images.shape[1:]], images.dtype.name
    outputs = [aval.shape for aval in program.out_avals]
    labels = len(metadata["labels"])
    named = metadata["output"] != "logits" or [shape[1:] for shape in outputs] == [(labels,)]
    if [shape, dtype] != [metadata["input_shape"], metadata["input_dtype"]] or not named:
        raise CheckpointError(f"{path}: corrupt: its program and {METADATA} do not fit each other.")


def _wrong(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: not an exported model, or truncated; wanted a file that `vit export` wrote. A "
        "checkpoint is loaded with `from_pretrained`."
    )


class _Archive:
    """The zip archive, read with its checksums."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise MissingFileError(f"{path}: cannot be read ({reason(error)}).") from error
        except Exception as error:  # zipfile lets through what broken data led it to
            raise _wrong(path) from error
        members = self._zip.infolist()
        self.names = {member.filename for member in members}
        if not self.names.issuperset(_NEEDED):
            self._zip.close()
            raise _wrong(path)
        packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
        if packed or len(self.names) != len(members):
            self._zip.close()
            raise CheckpointError(
                f"{path}: its members must be stored without compression, each name once; it was "
                "packed again by another program. Export it again."
            )

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except Exception as error:  # zipfile lets through what broken data led it to
            raise self._corrupt(name, reason(error)) from error

    def json(self, name: str) -> dict[str, Any]:
        if self._zip.getinfo(name).file_size > MAX_JSON_BYTES:
            raise self._corrupt(name, "larger than any JSON text read here")
        return parse_json(self.read(name), self._path, name)

    def parameters(self) -> dict[str, np.ndarray]:
        """Every array, read straight into the memory that JAX takes as it is."""
        member = self._zip.getinfo(PARAMETERS)
        file = _Member(self._path, member)
        try:
            tensors, _ = safetensors_file.read(file)
            length = 8 + int.from_bytes(file.read(0, 8), "little")
            checksum = zlib.crc32(file.read(0, length))
            arrays = {}
            for name, tensor in tensors.items():  # in the order they lie in the file
                arrays[name] = tensor.read()
                checksum = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, checksum)
        finally:
            file.close()
        if checksum != member.CRC:
            raise self._corrupt(PARAMETERS, "its checksum does not match")
        return arrays

    def _corrupt(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: corrupt: {name} in it cannot be read ({why}). Copy or export it again."
        )


class _Member(DataFile):
    """A stored member of a zip archive as a file of its own."""

    def __init__(self, path: Path, member: zipfile.ZipInfo) -> None:
        super().__init__(path)
        try:
            self._start = data_offset(self, member)
        except BaseException:
            self.close()
            raise
        self.size = member.file_size

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        return super()._read_into(buffer, getattr(self, "_start", 0) + offset)


__all__ = ["ExportedModel", "Prediction", "load"]
