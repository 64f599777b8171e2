"""`vit evaluate`: a labelled data set in, how good a model is on it out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_cli.options import (
    Options,
    Parser,
    Reading,
    add_batches,
    add_columns,
    add_model,
    add_pixel_limit,
    add_reading,
)
from vit_cli.options import positive as positive_number
from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import counted, say

if TYPE_CHECKING:
    from vit_flax.training.evaluate import Evaluation

PARTS = ("test", "val", "train")


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive_number(part) for part in text.split(",")))


def add_source(parser: Parser) -> None:
    """The labelled images, and how they are read."""
    parser.add_names(
        "SOURCE",
        "a folder of class folders (photos/test/CLASS/*.jpg), a folder of such parts "
        "(photos/{train,val,test}), or a table (.csv, .jsonl, .parquet)",
        least=1,
        most=1,
        wanted="one folder or table of labelled images",
    )
    group = parser.add_argument_group("reading the images")
    add_columns(group)
    group.add_argument(
        "--limit", metavar="N", type=positive_number, help="use N images only, for a quick look"
    )


def add_options(parser: Parser) -> None:
    parser.usage = "vit evaluate [options] SOURCE --model NAME"
    parser.description = (
        "Evaluate a classifier on labelled images: accuracy, scores of each class, confusion "
        "matrix and calibration. Classes are matched to the model's labels by name. Every image "
        "counts once; those that cannot be read are named on standard error and left out, and the "
        "exit code is then 1."
    )
    add_source(parser)
    parser.add_argument(
        "--split",
        choices=PARTS,
        help="part to evaluate on, where SOURCE has several (default: test, or val without one)",
    )
    add_model(parser)
    add_batches(parser)
    parser.add_argument(
        "--top-k",
        metavar="K,...",
        type=_ranks,
        default=(1, 5),
        help="count an image as right if its class is among the K most likely (default: 1,5)",
    )
    parser.add_argument(
        "--bins",
        metavar="N",
        type=positive_number,
        default=15,
        help="bins of the calibration error (default: 15)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--report", metavar="FILE", help="write a report with charts to an .html file"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write one row per image to a .jsonl, .csv or .parquet file",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="with --output: the probability of every class in each row",
    )
    parser.add_argument("--force", action="store_true", help="overwrite --report and --output")
    add_pixel_limit(parser)
    add_reading(parser)

    def check(options: Options) -> None:
        if options.output is None and options.probabilities:
            parser.error("--probabilities is for --output FILE")
        if options.output is None and options.report is None and options.force:
            parser.error("--force is for --output FILE and --report FILE")
        if options.report is not None and not options.report.lower().endswith((".html", ".htm")):
            parser.error(f"--report must end in .html; given {options.report!r}")

    parser.checks.append(check)


def run(options: Options) -> int:
    """Evaluate a model and print what was found.

    Returns:
        The exit code: 1 if an image could not be read.

    Raises:
        ViTError: the model or the data set cannot be loaded, they do not fit, or a file cannot be
            written.
    """
    from vit_cli.reports.evaluation import check_predictions_file, write_predictions
    from vit_cli.runs.labelled import check_source, open_for
    from vit_common.files.replace import check_target

    if options.output is not None:
        check_predictions_file(options.output, force=options.force)
    if options.report is not None:
        check_target(Path(options.report), force=options.force)
    source = options.names[0]
    check_source(source)
    model, processor, mesh = _load(options)
    dataset, part = open_for(
        model.config,
        source,
        part=options.split,
        image=options.image_column,
        label=options.label_column,
        limit=options.limit,
    )
    found = _evaluate(options, model, processor, mesh, dataset)
    for _, message in found.skipped:
        say("error", message)
    if options.output is not None:
        write_predictions(options.output, found, every=options.probabilities)
    summary = _summary(options, found, part, model, dataset)
    if options.report is not None:
        from vit_cli.reports.report import write_report

        write_report(
            options.report,
            title=f"{summary['model']} on {source}",
            evaluation=found,
            dataset=dataset,
            settings={
                "model": summary["model"],
                "images": f"{source} ({part})" if part else source,
                "dtype": options.dtype,
                "image size": " x ".join(map(str, summary["image_size"])),
            },
        )
    if options.json:
        json.dump(summary, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    else:
        from vit_cli.reports.evaluation import print_evaluation

        print_evaluation(found, summary)
    if found.skipped:
        say(
            "warning",
            f"{len(found.skipped)} of {counted(len(dataset))} could not be read and were left out",
        )
    return SOME_FAILED if found.skipped else DONE


def _load(options: Options) -> tuple[Any, Any, Any]:
    # Only now: a wrong name is reported at once, without the seconds that JAX takes.
    from vit_cli.runtime import enable_cache, find_devices
    from vit_common.embedded import embedded_checkpoint
    from vit_common.errors import InputError
    from vit_flax.training.evaluate import load_classifier

    enable_cache()
    there = find_devices()
    count = options.devices or len(there)
    if count > len(there):
        raise InputError(f"--devices must be at most {len(there)}; given {count}.")
    name = options.model or str(embedded_checkpoint())
    model, processor = load_classifier(name, options.dtype, **Reading.of(options).keywords)
    return model, processor, {"data": count} if count > 1 else None


def _evaluate(options: Options, model: Any, processor: Any, mesh: Any, dataset: Any) -> Evaluation:
    from vit_cli.terminal.progress import Progress
    from vit_flax.training.evaluate import evaluate

    with Progress(len(dataset), what="evaluating") as bar:
        return evaluate(
            model,
            dataset,
            processor=processor,
            batch_size=options.batch_size,
            mesh=mesh,
            top_k=options.top_k,
            bins=options.bins,
            progress=bar.reach,
        )


def _summary(
    options: Options, found: Evaluation, part: str | None, model: Any, dataset: Any
) -> dict[str, Any]:
    """Everything, as JSON has it."""
    metrics = dict(found.metrics)
    if metrics.get("confusion") is not None:
        metrics["confusion"] = metrics["confusion"].tolist()
    return {
        "model": options.model or "the digits model of the package",
        "source": options.names[0],
        "split": part,
        "problem_type": found.problem_type,
        "image_size": list(model.config.image_height_width),
        "images": len(found.names),
        "skipped": [{"file": name, "error": message} for name, message in found.skipped],
        "classes": list(found.classes or ()),
        "metrics": metrics,
    }
