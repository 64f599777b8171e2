"""`vit predict`: image files in, predictions out."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from vit_cli.models import load_for_inference, settings
from vit_cli.runs.job import Job, Work
from vit_cli.runs.prediction_file import Journal
from vit_cli.runs.supervise import Cluster
from vit_cli.terminal.messages import say
from vit_cli.terminal.results import JsonLines, PlainText, Table, Writer


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
    devices: int | None = None,
    model_parallel: int = 1,
    cluster: Cluster | None = None,
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
        output: file for the results instead of standard output; see `vit_cli.runs.prediction_file`.
        resume, force, shard, cluster: as `vit_cli.runs.job.Job`.
        devices: how many of this process's devices to use; None is all.
        model_parallel: devices that one copy of the network is split over.
        hub: more options of `from_pretrained`: those of the Hub, `param_dtype`, `weights`.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded.
        HostError: another process did not come, or stopped.
    """

    def begin(files: list[str]) -> Work:
        classifier = load_for_inference(
            "ImageClassifier", model, dtype, hub, devices=devices, model_parallel=model_parallel
        )
        size = batch_size or classifier.default_batch_size
        rich = _has_rich()
        printer = None
        if output is None:
            printer = _printer(as_json, files, classifier.config.id2label, rich=rich)
        return Work(classifier.stream(files, top_k=top_k, batch_size=size), size, printer)

    return Job(
        names,
        {**settings(model, dtype, hub, shard), "top_k": top_k},
        begin,
        Journal,
        what="classifying",
        output=output,
        resume=resume,
        force=force,
        shard=shard,
        cluster=cluster,
    ).run()


def _has_rich() -> bool:
    """Whether rich is installed; says so where it would be used and is not."""
    if importlib.util.find_spec("rich") is not None:
        return True
    if sys.stdout.isatty():
        say("warning", "tables and progress bars need rich; run: pip install rich")
    return False


def _printer(as_json: bool, files: list[str], labels: Mapping[int, Any], *, rich: bool) -> Writer:
    if as_json:
        return JsonLines(sys.stdout)
    if rich and sys.stdout.isatty():
        return Table(sys.stdout, files, map(str, labels.values()))
    return PlainText(sys.stdout, files)
