"""The compiled network: batches of pixels in, arrays out, compiled once for each size of batch."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vit_common.config import ViTConfig
from vit_common.errors import DeviceError
from vit_common.log import logger
from vit_flax.last_words import is_out_of_memory
from vit_flax.sharding import DATA, batch_sharding, batch_spec

Program = Callable[[Any, jax.Array], tuple[jax.Array, ...]]
"""From parameters and pixels (B, C, H, W) to arrays with a row for each image."""

# Largest activations of the images that a CPU works on together, so that they stay in its cache:
# float32 numbers of the widest layer, 12 MB.
_MICRO_BATCH_NUMBERS = 3 * 2**20


class Engine:
    """Runs a network on batches of images of one size.

    A batch is padded to a size that is compiled, ahead of the call. Where the device's memory
    does not hold a batch, it is run in halves, and so are those after it.

    Args:
        params: parameters, on the device.
        config: sizes of the network.
        shape: of one image, (C, H, W).
        dtype: of the pixels.
        mesh: devices to split batches over, see `vit_flax.sharding`, with the parameters
            on them; None for one device.

    Attributes:
        compilations: how many programs were compiled.
        padded: rows that were run only to fill a batch.
        tokens: of one image.
    """

    def __init__(
        self,
        params: Any,
        config: ViTConfig,
        shape: tuple[int, int, int],
        dtype: Any = np.float32,
        mesh: Mesh | None = None,
    ) -> None:
        self.params = params
        self.mesh = mesh
        self.parts_of_batch = 1 if mesh is None else mesh.shape[DATA]
        """Devices, or groups of devices, that a batch is split over."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.padded = 0
        self._programs: dict[Hashable, Program] = {}
        self._compiled: dict[tuple[Hashable, int], jax.stages.Compiled] = {}
        self._ready: set[tuple[Hashable, int]] = set()
        self._most: int | None = None  # images that fit into the device's memory together
        self._compiling = threading.Lock()
        self._launching = threading.Lock()
        self.shrinking = threading.Lock()
        """Held while `limit` is read in order to be lowered."""
        patch = config.patch_height_width
        self.tokens = config.num_prefix_tokens + (shape[1] // patch[0]) * (shape[2] // patch[1])
        width = max(config.intermediate_size, config.hidden_size)
        self._micro_batch = max(1, _MICRO_BATCH_NUMBERS // (self.tokens * width))

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def add(self, work: Hashable, program: Program) -> None:
        """Register a program under the name `work`; a name that is registered keeps its program."""
        self._programs.setdefault(work, program)

    def bucket(self, images: int, batch_size: int) -> int:
        """The batch size for a number of images: the next power of two, at most `batch_size`; on
        several devices, rounded up to a multiple of them."""
        return self.divisible(min(batch_size, 1 << (images - 1).bit_length()))

    def divisible(self, size: int) -> int:
        """The smallest size from `size` up that can be split over the devices."""
        return -(-size // self.parts_of_batch) * self.parts_of_batch

    def compile_all(self, work: Hashable, batch_size: int) -> None:
        """Compile every size that batches of up to `batch_size` images run in, up to what fits into
        the device's memory. From then on a smaller last batch runs in the smallest size that holds
        it."""
        batch_size = self.limit(batch_size)
        sizes = {*(1 << i for i in range(batch_size.bit_length())), batch_size}
        for size in sorted(set(map(self.divisible, sizes))):
            try:
                self.compile(work, size)
            except jax.errors.JaxRuntimeError as error:
                self.shrink(size, error)
                return
            self._ready.add((work, size))

    def compile_ahead(self, work: Hashable, size: int) -> None:
        """Compile the program for a batch padded to `size`, so that `start` need not. Failures are
        left to `Running.rows`, which can make do with less memory."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.compile(work, self.limit(self.divisible(size)))

    def compile(self, work: Hashable, size: int) -> jax.stages.Compiled:
        """The program for a batch of `size`, which must be `divisible`; compiled by the first
        thread that asks for it."""
        with self._compiling:
            return self._compile(work, size)

    def _compile(self, work: Hashable, size: int) -> jax.stages.Compiled:
        if (work, size) not in self._compiled:
            program, sharding = self._programs[work], None
            program = self._micro_batched(program, size // self.parts_of_batch)
            if self.mesh is not None:
                # Each part of a batch by itself: the compiler cannot decide to mix them.
                split, sharding = batch_spec(self.mesh.axis_names), batch_sharding(self.mesh)
                program = jax.shard_map(
                    program,
                    mesh=self.mesh,
                    in_specs=(PartitionSpec(), split),
                    out_specs=split,
                    axis_names={DATA},
                    check_vma=False,
                )
            pixel_values = jax.ShapeDtypeStruct((size, *self.shape), self.dtype, sharding=sharding)
            lowered = jax.jit(program).lower(self.params, pixel_values)
            start = time.perf_counter()
            self._compiled[work, size] = lowered.compile()
            seconds = time.perf_counter() - start
            logger.debug("compiled %s for %d images at once in %.1f s", work, size, seconds)
        return self._compiled[work, size]

    def _micro_batched(self, run: Program, size: int) -> Program:
        """On a CPU, the program a few images at a time, so that they stay in its cache; elsewhere
        the program itself."""
        most = self._micro_batch
        count = next(n for n in range(-(-size // most), size + 1) if size % n == 0)
        if count == 1 or self.platform != "cpu":
            return run

        def _run(params: Any, pixel_values: jax.Array) -> tuple[jax.Array, ...]:
            parts = pixel_values.reshape(count, size // count, *pixel_values.shape[1:])
            rows = jax.lax.map(lambda part: run(params, part), parts)
            return tuple(array.reshape(size, *array.shape[2:]) for array in rows)

        return _run

    @property
    def platform(self) -> str:
        """Platform of the device that holds the parameters: "cpu", "gpu" or "tpu"."""
        if self.mesh is not None:
            return self.mesh.devices.flat[0].platform
        leaf = jax.tree.leaves(self.params)[0]
        return next(iter(leaf.devices())).platform if isinstance(leaf, jax.Array) else "cpu"

    def start(self, work: Hashable, pixel_values: np.ndarray, size: int) -> Running:
        """Start to run a batch (B, C, H, W), padded to `size` or to a smaller size that
        `compile_all` compiled; `Running.rows` waits for its results.

        Raises:
            DeviceError: the device's memory does not hold a single image.
        """
        return Running(self, work, pixel_values, size)

    def parts(self, pixel_values: np.ndarray, size: int) -> list[np.ndarray]:
        """A batch cut into parts that fit into the device's memory."""
        most = self.limit(size)
        return [pixel_values[i : i + most] for i in range(0, len(pixel_values), most)]

    def limit(self, size: int) -> int:
        """`size`, or less if the device's memory holds less."""
        return min(size, self._most or size)

    def dispatch(self, work: Hashable, pixel_values: np.ndarray, size: int) -> _Arrays:
        """Start to run one part."""
        images = len(pixel_values)
        size = self.limit(self.divisible(size))
        # Not what happens to be compiled: the bits of a result would depend on what ran before.
        ready = [n for name, n in tuple(self._ready) if name == work and images <= n <= size]
        size = min(ready, default=size)
        compiled = self.compile(work, size)
        if images < size:
            padded = np.zeros((size, *self.shape), self.dtype)
            padded[:images] = pixel_values
            pixel_values = padded
            self.padded += size - images
        if self.mesh is None:
            return _Arrays(images, tuple(compiled(self.params, pixel_values)))
        # Devices that communicate must all meet the programs of several threads in one order.
        with self._launching:
            return _Arrays(images, tuple(compiled(self.params, pixel_values)))

    def shrink(self, size: int, error: Exception) -> None:
        """Remember that a batch of `size` does not fit into memory; raise `error` if it is about
        something else."""
        if not is_out_of_memory(error):
            raise error
        size = self.divisible(size)
        if size <= self.parts_of_batch:
            raise DeviceError(
                f"the device's memory does not hold one image of {self.shape[1]} x {self.shape[2]} "
                "pixels in this network; use dtype bfloat16, or a smaller network or image."
            ) from error
        self._most = size // 2 // self.parts_of_batch * self.parts_of_batch
        warnings.warn(
            f"out of device memory with {size} images at once; going on with {self._most}.",
            RuntimeWarning,
            stacklevel=2,
        )


class _Arrays(NamedTuple):
    images: int
    arrays: tuple[jax.Array, ...]  # (size, ...)

    def rows(self) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(array)[: self.images] for array in self.arrays)


class Running:
    """A batch that is being run."""

    def __init__(self, engine: Engine, work: Hashable, pixel_values: np.ndarray, size: int) -> None:
        self._engine, self._work = engine, work
        self._pixel_values, self._size = pixel_values, size
        self._parts: list[_Arrays] = []
        self._error: Exception | None = None
        self._start()

    def _start(self) -> None:
        """Start to run the parts. A failure here is handled by `rows`: earlier batches may still
        hold the memory that this one needs."""
        self._tried = self._engine.limit(self._size)
        try:
            self._error = None
            self._parts = [
                self._engine.dispatch(self._work, part, self._size)
                for part in self._engine.parts(self._pixel_values, self._size)
            ]
        except jax.errors.JaxRuntimeError as error:
            self._parts, self._error = [], error

    def rows(self) -> tuple[np.ndarray, ...]:
        """Arrays (B, ...) on the host, without padding.

        Raises:
            DeviceError: the device's memory does not hold a single image.
        """
        while True:
            try:
                if self._error is not None:
                    raise self._error
                parts = [part.rows() for part in self._parts]
            except jax.errors.JaxRuntimeError as error:
                self._parts = []
                with self._engine.shrinking:
                    if self._engine.limit(self._size) == self._tried:  # else an earlier batch did
                        self._engine.shrink(self._tried, error)
                self._start()
                continue
            return tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))
