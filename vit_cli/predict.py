"""`vit predict`: image files in, predictions out."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from vit_cli import interrupt
from vit_cli.exit_codes import DONE, INTERRUPTED, SOME_FAILED
from vit_cli.messages import say
from vit_cli.progress import Progress
from vit_cli.results import JsonLines, PlainText, Table, Writer
from vit_cli.sources import find_images


def predict(
    names: list[str],
    model: str | None,
    *,
    top_k: int = 5,
    batch_size: int | None = None,
    dtype: str = "float32",
    as_json: bool = False,
    hub: Mapping[str, Any] | None = None,
) -> int:
    """Classify image files and print what they show.

    Results go to standard output in the order of the files; everything else goes to standard
    error.

    Args:
        names: image files, and folders of them.
        model: folder, weights file or Hub name; None is the checkpoint in the package.
        top_k: classes to print an image.
        batch_size: images that go through the model at once; None is the model's own choice.
        dtype: of the computation.
        as_json: print JSON lines.
        hub: options of the Hub.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded.
    """
    failed = 0

    def report(text: str) -> None:
        nonlocal failed
        failed += 1
        say("error", text)

    files = list(find_images(names, report))
    if not files:
        return SOME_FAILED

    # Only now: a name that is wrong is told at once, without the seconds that JAX takes.
    from vit_cli.devices import find_devices
    from vit_flax.inference import ImageClassifier

    find_devices()
    if model is None:
        from vit_common.embedded import embedded_checkpoint

        model = str(embedded_checkpoint())
    classifier = ImageClassifier.from_pretrained(model, dtype=dtype, **(hub or {}))
    batch_size = batch_size or classifier.default_batch_size
    rich = _has_rich()
    writer = _writer(as_json, files, classifier.config.id2label, rich=rich)

    done = 0
    results = classifier.stream(files, top_k=top_k, batch_size=batch_size)
    with Progress(len(files), show=rich) as progress:
        try:
            with interrupt.raises(), closing(results):
                for result in results:
                    if result.error is not None:
                        failed += 1
                        progress.say("error", str(result.error))
                    else:
                        writer.write(result.source, result.predictions)
                    done += 1
                    if done % batch_size == 0:  # they come a batch at a time
                        with progress.hidden():
                            writer.flush()
                        progress.advance(batch_size)
        except KeyboardInterrupt:
            with progress.hidden():
                writer.flush()
                say(f"interrupted: {done} of {len(files)} images done")
            return INTERRUPTED
        with progress.hidden():
            writer.flush()
    return SOME_FAILED if failed else DONE


def _has_rich() -> bool:
    """Whether rich is installed; says so where it would be used and is not."""
    if importlib.util.find_spec("rich") is not None:
        return True
    if sys.stdout.isatty():
        say("warning", 'tables and progress bars need rich; run: pip install "vit-flax[cli]"')
    return False


def _writer(as_json: bool, files: list[str], labels: Mapping[int, Any], *, rich: bool) -> Writer:
    if as_json:
        return JsonLines(sys.stdout)
    if rich and sys.stdout.isatty():
        return Table(sys.stdout, files, map(str, labels.values()))
    return PlainText(sys.stdout, files)
