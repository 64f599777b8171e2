"""`vit predict`: image files in, predictions out."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from vit_cli import interrupt
from vit_cli.exit_codes import DONE, INTERRUPTED, SOME_FAILED
from vit_cli.journal import Journal
from vit_cli.messages import say
from vit_cli.models import load_for_inference, precision_of
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
    output: str | None = None,
    resume: bool = False,
    force: bool = False,
    shard: tuple[int, int] | None = None,
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
        output: file for the results instead of standard output; see `vit_cli.journal`.
        resume: go on with what an earlier run left of `output`.
        force: overwrite `output`.
        shard: (i, n): only the i-th of n parts of the files, counted from 0; which part a file is
            in, its name decides.
        hub: more options of `from_pretrained`: those of the Hub, `param_dtype`, `weights`.

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
    if shard is not None:
        files = [file for file in files if in_shard(file, *shard)]
    journal: Journal | None = None
    if output is not None:
        run = {"model": model, "top_k": top_k, "dtype": dtype, **precision_of(hub)}
        journal = Journal(output, resume=resume, force=force, run=run)
        failed += journal.failed
        total = len(files)
        files = list(dict.fromkeys(file for file in files if file not in journal.done))
        if len(files) < total:
            say(f"{total - len(files)} of {total} images are done already")
    if not files:
        if journal is not None:
            journal.finish()
        return SOME_FAILED if failed else DONE

    try:
        classifier = load_classifier(model, dtype, hub)
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    batch_size = batch_size or classifier.default_batch_size
    rich = _has_rich()
    writer: Writer
    if journal is not None:
        writer = journal
    else:
        writer = _writer(as_json, files, classifier.config.id2label, rich=rich)

    done = 0
    results = classifier.stream(files, top_k=top_k, batch_size=batch_size)
    with Progress(len(files), show=rich) as progress:
        try:
            with interrupt.raises() as asked, closing(results):
                for result in results:
                    if asked():
                        raise KeyboardInterrupt
                    if result.error is not None:
                        failed += 1
                        progress.say("error", str(result.error))
                        if journal is not None:
                            journal.fail(result.source, str(result.error))
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
                how = "" if journal is None else "; --resume goes on from there"
                if journal is not None:
                    journal.close()
                say(f"interrupted: {done} of {len(files)} images done{how}")
            return INTERRUPTED
        with progress.hidden():
            writer.flush()
    if journal is not None:
        journal.finish()
        say(f"wrote {output}: {done} images")
    return SOME_FAILED if failed else DONE


def load_classifier(
    model: str | None, dtype: str, hub: Mapping[str, Any] | None, **options: Any
) -> Any:
    """The classifier of a command; None is the checkpoint in the package."""
    return load_for_inference("ImageClassifier", model, dtype, {**options, **(hub or {})})


def in_shard(file: str, index: int, count: int) -> bool:
    """Whether a file is in one of `count` parts; the same for everyone who asks."""
    return zlib.crc32(os.fsencode(file)) % count == index


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
