"""`vit search`: photos in, the images most like each of them out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_cli.models import load_for_inference
from vit_cli.options import (
    DTYPES,
    Options,
    Parser,
    Reading,
    add_pixel_limit,
    add_precision,
    add_reading,
    layer_numbers,
    positive,
    precision_of,
)
from vit_cli.search.sheet import find_file
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import printable, say
from vit_cli.terminal.progress import Progress
from vit_common.errors import InputError, MissingFileError, ViTError

if TYPE_CHECKING:
    from vit_flax.inference import ImageIndex, Neighbour

_AT_ONCE = 1024  # queries in one pass over the index
_TRIED = 8  # images of the index that may stand for the others
_SAME = 0.99  # cosine of features that differ by precision alone
_POOLS = {"cls": "cls", "mean": "mean", "none": None}
_OF_THE_RUN = ("shard", "store_dtype", "layers", "pool", "model", "revision", "subfolder", "dtype")
_PRECISION = ("param_dtype", "weights", "activations")


def add_options(parser: Parser) -> None:
    parser.usage = "vit search [options] IMAGE|DIR ... --index FILE"
    parser.description = (
        "Find the images most like each photo: those whose features have the largest cosine "
        "similarity to the photo's, among the features in a file of `vit features`. The search is "
        "exact. The photo's features are made as the file says its own were."
    )
    parser.add_names(
        "IMAGE|DIR",
        "image files, or folders to search for image files at any depth",
        least=1,
        most=None,
        wanted="at least one image or folder",
    )
    parser.add_argument(
        "--index", metavar="FILE", help=".npz, .parquet or .safetensors file of `vit features`"
    )
    parser.add_argument(
        "--top", metavar="N", type=positive, default=10, help="neighbours per image (default: 10)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line, one line per image"
    )
    parser.add_argument(
        "--output", metavar="FILE", help=".png, .jpg or .webp file: a sheet of what was found"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the sheet")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="folder, weights file, or name on the Hub (default: the model that the index names)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compute dtype (default: that of the index, or float32)"
    )
    add_precision(parser)
    parser.add_argument(
        "--layers",
        metavar="L,...",
        type=layer_numbers,
        help="as in `vit features` (default: those that the index names, or -1)",
    )
    parser.add_argument(
        "--pool",
        choices=("cls", "mean"),
        help="as in `vit features` (default: that of the index, or cls)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, help="images that go through the model at once"
    )
    add_pixel_limit(parser)
    add_reading(parser)

    def check(options: Options) -> None:
        if options.index is None:
            parser.error("--index FILE is needed; `vit features --output FILE` writes one")
        if options.force and options.output is None:
            parser.error("--force is for --output FILE")

    parser.checks.append(check)


def run(options: Options) -> int:
    """Print the nearest images of each photo, and draw them with `--output`.

    Returns:
        The exit code: 1 if a photo could not be read or a folder held none.

    Raises:
        ViTError: the index or the model cannot be used, or the sheet not be written.
    """
    from vit_cli.search import sheet
    from vit_common.images.find import find_images
    from vit_flax.inference import ImageIndex

    if options.output is not None:
        sheet.check(options.output, force=options.force)
    with ImageIndex.open(options.index) as index:
        if not len(index):
            raise InputError(f"{options.index}: holds no features, so there is nothing to find.")
        how = How(options, index, options.model)
        failed = 0

        def report(text: str) -> None:
            nonlocal failed
            failed += 1
            say("error", text)

        files = list(find_images(options.names, report, say))
        if options.output is not None:
            sheet.check_count(len(files))
        if not files:
            return SOME_FAILED
        encoder = how.load()
        how.check(encoder)
        shown: list[tuple[str, list[Neighbour]]] = []
        size = options.batch_size or encoder.default_batch_size
        results = encoder.stream_features(files, how.layers, how.pool, size)
        with (
            interrupt.exits_at_once(),
            closing(results),
            Progress(len(files), what="searching") as bar,
        ):
            waiting: list[tuple[str, Any]] = []

            def search() -> None:
                if waiting:
                    import numpy as np

                    found = index.search(np.stack([each for _, each in waiting]), options.top)
                    with bar.hidden():
                        for (file, _), near in zip(waiting, found, strict=True):
                            _print(file, near, as_json=options.json)
                            if options.output is not None:
                                shown.append((file, near))
                        sys.stdout.flush()
                    waiting.clear()

            for result in results:
                bar.advance(1)
                if result.error is not None:
                    failed += 1
                    bar.say("error", str(result.error))
                    continue
                waiting.append((result.source, result.value))
                if len(waiting) == _AT_ONCE:
                    search()
            search()
        if shown:
            gone = sheet.write(options.output, shown, beside=Path(options.index).parent)
            lost = f"; {len(gone)} images cannot be shown, the first is {gone[0]}" if gone else ""
            say(f"wrote {options.output}: {len(shown)} x {len(shown[0][1])} images{lost}")
    return SOME_FAILED if failed else DONE


def _print(file: str, near: Sequence[Neighbour], *, as_json: bool) -> None:
    if as_json:
        listed = [each._asdict() for each in near]
        sys.stdout.write(json.dumps({"file": file, "neighbours": listed}) + "\n")
        return
    for each in near:
        sys.stdout.write(f"{printable(file)}  {each.similarity:7.4f}  {printable(each.file)}\n")


def _typed(value: Any) -> str:
    """A value as the option that gives it is written."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class How:
    """How the features of an index were made, as it says, or as the options do.

    Args:
        options: of the command: `index`, `layers`, `pool`, and those of `load`.
        index: the features.
        model: name of the model that was given, if one was.

    Attributes:
        layers, pool: as `features` takes them.
    """

    def __init__(self, options: Options, index: ImageIndex, model: str | None) -> None:
        stated = self._stated = index.made_with
        # The name that the index has too says nothing new: the rest is as the index says.
        model = None if model == stated.get("model") else model
        self._options, self._index, self._model = options, index, model
        if model is None and "model" not in stated:
            raise self._fail("does not say which model made it; name that with --model")
        self.layers = self._one_of("--layers", options.layers, self._stated_layers(), (-1,))
        pool = None if options.pool is None else options.pool
        self.pool = self._one_of("--pool", pool, stated.get("pool", pool or "cls"), "cls")
        if self.pool is None:
            raise self._fail(
                "holds all tokens of each image; wanted one vector per image, so write it with "
                "`vit features --pool cls` or `--pool mean`"
            )
        if self.pool not in _POOLS:
            raise self._fail(f"has the pooling {self.pool!r}; wanted cls or mean")

    def _fail(self, text: str) -> InputError:
        return InputError(f"{self._options.index}: {text}.")

    def _stated_layers(self) -> tuple[int, ...] | None:
        layers = self._stated.get("layers")
        if layers is None:
            return None
        if not isinstance(layers, list) or not all(type(n) is int for n in layers) or not layers:
            raise self._fail(f"has the layers {layers!r}; wanted numbers of blocks")
        return tuple(layers)

    def _one_of(self, option: str, given: Any, stated: Any, default: Any) -> Any:
        """What was given, what the index says, or the default."""
        if given is not None and stated is not None and given != stated:
            raise InputError(
                f"{option}: {self._options.index} was made with {_typed(stated)}; given "
                f"{_typed(given)}. Leave {option} out, or write the index anew."
            )
        if given is None and stated is None and option != "--pool":
            return default
        return stated if given is None else given

    @property
    def name(self) -> str | None:
        """Name of the model; None is the small one of digits."""
        stated = self._stated.get("model")
        if self._model is not None:
            return self._model
        if stated is not None and not isinstance(stated, str):
            raise self._fail(f"names the model {stated!r}; wanted its name")
        return stated

    def load(self, kind: str = "ImageEncoder", devices: int | None = 1) -> Any:
        """The network.

        Args:
            kind: class of `vit_flax.inference`.
            devices: of this machine to use; None is all.

        Raises:
            ViTError: it cannot be loaded.
        """
        options = self._options
        dtype, precision = options.dtype, precision_of(options)
        reading = Reading.of(options)
        if self._model is None:
            dtype = dtype or self._stated.get("dtype")
            dtype = dtype if dtype in DTYPES else None
            precision = {**self._precision(), **precision}
            reading = self._reading(reading)
        try:
            return load_for_inference(
                kind,
                self.name,
                dtype or "float32",
                devices=devices,
                **precision,
                **reading.keywords,
            )
        except MissingFileError as error:
            if self._model is not None:
                raise
            raise MissingFileError(
                f"{str(error).rstrip('.')}. It made {options.index}; --model says where it is now."
            ) from error

    def _precision(self) -> dict[str, Any]:
        return {name: self._stated[name] for name in _PRECISION if name in self._stated}

    def _reading(self, given: Reading) -> Reading:
        """How the index says that the model was read, and what the options say beside it."""
        stated = self._stated
        known = {*_OF_THE_RUN, *_PRECISION, "format", "ignore"}
        fields = {name: value for name, value in stated.items() if name not in known}
        hub = {name: stated[name] for name in ("revision", "subfolder") if stated.get(name)}
        return Reading(
            given.format or stated.get("format"),
            {**fields, **given.overrides},
            {**hub, **given.hub},
            given.ignore or tuple(stated.get("ignore") or ()),
        )

    def check(self, encoder: Any) -> None:
        """See that the network makes such features as the index holds.

        Raises:
            InputError: it does not.
        """
        config, index = encoder.config, self._index
        wanted = index.shape[1:]
        several = (len(self.layers),) if len(self.layers) > 1 else ()
        if wanted != (*several, config.hidden_size):
            made = " x ".join(map(str, (*several, config.hidden_size)))
            raise self._fail(
                f"holds features of {' x '.join(map(str, wanted))} per image; {self._shown} gives "
                f"{made}. Both must be of the same model, layers and pooling"
            )
        if self._model is not None:
            self._compare(encoder)

    @property
    def _shown(self) -> str:
        return self.name or "the model of digits that comes with the package"

    def _compare(self, encoder: Any) -> None:
        """Make the features of one image of the index anew, and compare."""
        import numpy as np

        index, beside = self._index, Path(self._options.index).parent
        for i in range(min(_TRIED, len(index))):
            place = find_file(index.files[i], beside)
            if place is None:
                continue
            try:
                here = encoder.features(os.fspath(place), self.layers, self.pool)
            except ViTError:
                continue
            a = np.asarray(here, np.float64).reshape(-1)
            b = np.asarray(index.vector(i), np.float64).reshape(-1)
            cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            if not cosine >= _SAME:
                raise self._fail(
                    f"holds other features of {index.files[i]} than {self._shown} makes (cosine "
                    f"{cosine:.2f}, wanted 1.00): it was made with {self._of_the_index()}"
                )
            return
        say(
            "warning",
            f"{self._options.index} was made with {self._of_the_index()}, and its images are not "
            f"here to see whether {self._shown} makes the same features",
        )

    def _of_the_index(self) -> str:
        stated: Mapping[str, Any] = self._stated
        if "model" not in stated:
            return "a model that it does not name"
        return f"the model {stated['model'] or 'of digits that comes with the package'}"
