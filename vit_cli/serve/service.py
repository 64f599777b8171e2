"""What a server does with images, whatever the protocol: a bounded number of them is decoded by
threads and run in batches, each before a deadline or not at all."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from vit_cli.serve.batcher import Batcher, Slot
from vit_cli.serve.limits import Deadline, Limits, Refusal
from vit_cli.serve.metrics import Metrics
from vit_common.errors import ImageError, InputError, ViTError
from vit_common.images import kinds
from vit_common.log import logger
from vit_flax.inference import ImageClassifier, ImageIndex

# What is decoded at all: Pillow has readers that start other programs, such as that of EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "MPO", "JPEG2000", "HEIF")
_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PNM"
_AFTER = 60  # seconds that are named at most for another try


class Work(NamedTuple):
    """What is made of an image: arguments of `ImageEncoder.run`."""

    output: Any
    layers: tuple[int, ...] = (-1,)
    pool: Any = "auto"


PREDICT = Work("probabilities")


class Service:
    """A network, ready for images from anywhere.

    Args:
        encoder: the network; an `ImageClassifier` predicts, too.
        name: of the model, for those who ask.
        batch_size: images that run together at most; None is the encoder's default.
        limits: what is taken.
        index: features to find the nearest in.
        neighbours: layers and pooling of the index.
        beside: folder that names of its pictures may be in.
        runners: batches at a time; with 2 the device has the next one when it is done with one.

    Attributes:
        metrics: what was done so far.
        waiting: images that are waiting or being worked on.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        name: str = "",
        batch_size: int | None = None,
        limits: Limits | None = None,
        index: ImageIndex | None = None,
        neighbours: tuple[Sequence[int], Any] = ((-1,), "auto"),
        beside: Path | None = None,
        runners: int = 2,
    ) -> None:
        self.encoder, self.name, self.limits = encoder, name, limits or Limits()
        self.index, self.beside = index, beside or Path()
        self.batch_size = batch_size or encoder.default_batch_size
        self.features = Work("features")
        self.attention = Work("attention", tuple(range(encoder.config.num_hidden_layers)), None)
        self.near = Work("features", tuple(neighbours[0]), neighbours[1])
        self.metrics = Metrics()
        self.waiting = 0
        self.held = 0  # bytes
        self.stopping = False
        self._decoders = ThreadPoolExecutor(encoder.workers, thread_name_prefix="vit-decode")
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="vit-search")
        sizes: dict[Hashable, int] = dict.fromkeys(self._works, self.batch_size)
        sizes[self.attention] = 1
        self._batcher = Batcher(self._run, sizes, runners)

    @property
    def classifies(self) -> bool:
        """Whether the network has classes."""
        return isinstance(self.encoder, ImageClassifier)

    @property
    def _works(self) -> list[Work]:
        works = [PREDICT] if self.classifies else []
        works.append(self.features)
        if self.index is not None and self.near != self.features:
            works.append(self.near)
        return [*works, self.attention]

    def warm(self, note: Callable[[str], object] = lambda text: None) -> None:
        """Compile everything that requests may need, so that none of them waits for it."""
        encoder = self.encoder
        size = min(self.batch_size, encoder.engine.limit(self.batch_size))
        sizes = sorted({*(1 << i for i in range(size.bit_length())), size})
        for work in self._works:
            note(f"compiling {work.output}")
            for each in [1] if work == self.attention else sizes:
                zeros = np.zeros((each, *encoder.engine.shape), encoder.engine.dtype)
                self._run(work, zeros)

    def close(self) -> None:
        """End the threads; what waits is not done."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._searcher.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()

    @property
    def batches(self) -> dict[int, int]:
        """Number of images -> batches that had so many."""
        return dict(self._batcher.batches)

    def _run(self, work: Any, pixels: np.ndarray) -> np.ndarray:
        return self.encoder.run(
            pixels,
            work.output,
            layers=work.layers,
            pool=work.pool,
            batch_size=1 if work == self.attention else self.batch_size,
        )

    # -- admission; all in the thread of the event loop

    def admit(self, images: int, size: int) -> None:
        """Refuse what there is no room for.

        Args:
            images: more of them.
            size: bytes more.

        Raises:
            Refusal: there is no room.
        """
        limits = self.limits
        if self.stopping:
            raise Refusal(503, "this server is being stopped.", retry=1, close=True)
        if self.waiting + images > limits.queue:
            full = f"{self.waiting} images are waiting already (at most {limits.queue})"
        elif self.held + size > limits.memory:
            full = f"requests hold {self.held} bytes already (at most {limits.memory})"
        else:
            return
        left = math.ceil(self.waiting / self._batcher.rate) if self._batcher.rate else 1
        raise Refusal(429, f"{full}; try again later.", retry=min(_AFTER, max(1, left)))

    # -- images

    async def answer(
        self,
        work: Work,
        images: Sequence[bytes],
        deadline: Deadline,
        gone: Callable[[], Coroutine[Any, Any, Any]] | None = None,
    ) -> list[Any]:
        """What the network makes of images: for each an array, or the Refusal that it gets.

        Args:
            work: one of those that the service knows.
            images: contents of files.
            deadline: of the answer.
            gone: what it gives is done when nobody waits for the answer any more.

        Raises:
            Refusal: there is no room for so many, or the deadline passed.
            ConnectionResetError: nobody waits any more.
        """
        self.admit(len(images), sum(map(len, images)))
        loop = asyncio.get_running_loop()
        slots: list[Slot] = []
        answers: list[asyncio.Future[Any]] = []
        for data in images:
            answer: asyncio.Future[Any] = loop.create_future()
            slot = Slot(work, self._settler(loop, answer, len(data)))
            self.waiting += 1
            self.held += len(data)
            slots.append(slot)
            answers.append(answer)
            self._decoders.submit(self._prepare, slot, data)
        everything = asyncio.gather(*answers)
        leaving = None if gone is None else loop.create_task(gone())
        try:
            wanted = [everything] if leaving is None else [everything, leaving]
            await asyncio.wait(wanted, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
            if everything.done():
                return [self._named(work, value) for value in everything.result()]
        finally:
            if leaving is not None:
                leaving.cancel()
            if not everything.done():
                for slot in slots:
                    slot.gone.set()
                everything.cancel()
        if leaving is not None and leaving.done() and not leaving.cancelled():
            raise ConnectionResetError
        raise Refusal(
            504, f"not done within {self.limits.seconds:g} seconds; try again later.", retry=1
        )

    def _settler(
        self, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], size: int
    ) -> Callable[[Any], None]:
        def settled(value: Any) -> None:
            self.waiting -= 1
            self.held -= size
            if not answer.done():
                answer.set_result(value)

        def settle(value: Any) -> None:
            try:
                loop.call_soon_threadsafe(settled, value)
            except RuntimeError:  # the loop is closed: the server has ended
                logger.debug("an answer came after the server had ended")

        return settle

    def _named(self, work: Work, value: Any) -> Any:
        """An answer, or what is said instead."""
        what = "predictions" if work == PREDICT else str(work.output)
        if isinstance(value, Refusal):
            self.metrics.image(what, "refused")
            return value
        if isinstance(value, np.ndarray) and np.isfinite(value).all():
            self.metrics.image(what, "ok")
            return value
        self.metrics.image(what, "failed")
        if value is None:
            return Refusal(503, "this server is being stopped.", retry=1)
        if isinstance(value, np.ndarray):
            return Refusal(500, "the model's output is not finite (NaN or infinity).")
        logger.debug("a batch failed: %r", value)
        text = str(value) if isinstance(value, ViTError) else "the network could not be run."
        return Refusal(500, text)

    def _prepare(self, slot: Slot, data: bytes) -> None:
        """In a thread: an image's pixels, which then wait for their batch."""
        if slot.gone.is_set():
            slot.settle(None)
            return
        try:
            slot.pixels = self.pixels(data)
        except Refusal as refusal:
            slot.settle(refusal)
        except BaseException as error:  # whoever waits must hear of it
            slot.settle(error)
        else:
            self._batcher.put(slot)

    def pixels(self, data: bytes) -> np.ndarray:
        """The content of an image file as (C, H, W).

        Raises:
            Refusal: it is no image, of a kind that is not decoded, too large, or broken.
        """
        self.look_at(data)
        try:
            return self.encoder.preparer.one(data)
        except ViTError as error:
            text = str(error).removeprefix(f"{len(data)} bytes: ")
            raise Refusal(422, text) from error

    def look_at(self, data: bytes) -> None:
        """Refuse what must not be decoded, from its first bytes.

        Raises:
            Refusal: it is no image, of a kind that is not decoded, or too large.
        """
        if not data:
            raise Refusal(422, "the image is empty.")
        if kinds.is_heif(data[: kinds.HEAD]) and kinds.can_read_heif():
            import pillow_heif

            pillow_heif.register_heif_opener()
        try:
            with PIL.Image.open(io.BytesIO(data), formats=_known()) as image:
                width, height = image.size
        except PIL.UnidentifiedImageError:
            raise Refusal(415, f"not an image of a kind that is taken: {_NAMES}.") from None
        except PIL.Image.DecompressionBombError:
            width = height = math.isqrt(self.limits.pixels) + 1
        except MemoryError:
            raise Refusal(413, "not enough memory to decode this image.") from None
        except Exception as error:  # Pillow's readers raise whatever broken data led them to
            raise Refusal(422, "the image cannot be decoded.") from error
        if width * height > self.limits.pixels:
            raise Refusal(
                413,
                f"an image may have at most {self.limits.pixels} pixels; this one has more.",
            )

    def seen(self, data: bytes) -> bytes:
        """An image as the network is given it, as a PNG."""
        stream = io.BytesIO()
        self.encoder.seen(data).convert("RGB").save(stream, "PNG")
        return stream.getvalue()

    async def aside(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Do something in a thread that decodes."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, call, *arguments)

    # -- the index

    async def search(self, vectors: np.ndarray, top: int) -> list[Any]:
        """The nearest pictures of the index."""
        assert self.index is not None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searcher, self.index.search, vectors, top)

    def picture(self, number: int, side: int = 224) -> bytes:
        """A picture of the index, small, as a JPEG.

        Raises:
            Refusal: there is none of that number, or its file is gone or cannot be read.
        """
        from vit_cli.search.sheet import find_file, small

        index = self.index
        if index is None or not 0 <= number < len(index):
            raise Refusal(404, "there is no such picture.")
        place = find_file(index.files[number], self.beside)
        if place is None:
            raise Refusal(404, "this picture is not here any more.")
        try:
            image = small(place, side)
        except (ImageError, InputError, OSError):
            raise Refusal(404, "this picture cannot be read.") from None
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        return stream.getvalue()


def _known() -> list[str]:
    """Those of `FORMATS` that Pillow has a reader for."""
    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]
