"""`vit probe`: labelled images in, how well frozen features tell their classes apart out."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import numpy as np

from vit_cli.commands.evaluate import add_source
from vit_cli.options import (
    Options,
    Parser,
    Reading,
    add_batches,
    add_model,
    add_pixel_limit,
    add_reading,
)
from vit_cli.options import positive as positive_number
from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import counted, say

_POOLS = ("cls", "mean", "cls+mean")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"must be numbers of blocks with commas between; given {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _neighbours(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive_number(part) for part in text.split(",")))


def _strengths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise argparse.ArgumentTypeError(
            f"must be positive numbers with commas between; given {text!r}"
        )
    return values


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1; given {text!r}")
    return value


def add_options(parser: Parser) -> None:
    parser.usage = "vit probe [options] SOURCE --model NAME"
    parser.description = (
        "Measure a model's features without training it: k nearest neighbours and logistic "
        "regression learn from the features of training images, and are judged on test images. "
        "Any model will do, with a classifier or without. Images that cannot be read are named on "
        "standard error and left out; the exit code is then 1."
    )
    add_source(parser)
    add_model(parser)
    parser.add_argument(
        "--pool",
        choices=_POOLS,
        help="the class token, the mean of the patches, or both joined (default: cls, or mean "
        "for a network without a class token)",
    )
    parser.add_argument(
        "--layers",
        metavar="L,...",
        type=_layers,
        default=(-1,),
        help="blocks, the first is 0; -1 is the last, after the final norm; features of several "
        "are joined (default: -1)",
    )
    parser.add_argument(
        "--neighbours",
        metavar="K,...",
        type=_neighbours,
        default=(5, 20),
        help="numbers of nearest neighbours (default: 5,20)",
    )
    parser.add_argument(
        "--C",
        metavar="C,...",
        type=_strengths,
        help="inverse strength of the regularisation; of several the best on validation images is "
        "taken (default: 13 values from 1e-4 to 100)",
    )
    parser.add_argument(
        "--test-share",
        metavar="SHARE",
        type=_share,
        default=0.2,
        help="share of the images to test on, where SOURCE has no test or val part (default: 0.2)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of that choice (default: 0)"
    )
    add_batches(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_pixel_limit(parser)
    add_reading(parser)


def run(options: Options) -> int:
    """Measure features and print what was found.

    Returns:
        The exit code: 1 if an image could not be read.

    Raises:
        ViTError: the model or the images cannot be loaded, or have no classes; or scikit-learn is
            not installed.
    """
    import importlib.util

    from vit_cli.models import load_for_inference
    from vit_cli.runs.labelled import check_source, columns
    from vit_common.datasets import open_images
    from vit_common.errors import InputError

    if importlib.util.find_spec("sklearn") is None:
        raise InputError(
            "vit probe needs scikit-learn; run: pip install scikit-learn (the extra `probe`)"
        )
    source = options.names[0]
    check_source(source)
    parts = open_images(
        source, limit=options.limit, **columns(options.image_column, options.label_column)
    )
    parts, test = _parts(parts, options)
    encoder = load_for_inference(
        "ImageEncoder",
        options.model,
        options.dtype,
        devices=options.devices,
        **Reading.of(options).keywords,
    )
    _check_pool(options.pool, encoder.config)
    features, skipped = _features(encoder, parts, options)
    for _, message in skipped:
        say("error", message)
    for name, each in features.items():
        if not len(each[1]):
            raise InputError(f"{source}: none of the {name} images could be read.")
    found = _probe(features, parts["train"].classes or (), options)
    summary = _summary(options, encoder.config, parts, features, test, skipped, found)
    if options.json:
        json.dump(summary, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    else:
        _print(summary)
    if skipped:
        total = sum(map(len, parts.values()))
        say("warning", f"{len(skipped)} of {counted(total)} could not be read and were left out")
    return SOME_FAILED if skipped else DONE


def _parts(parts: dict[str, Any], options: Options) -> tuple[dict[str, Any], str]:
    """Training, validation and test images, and which part is tested on."""
    from vit_common.datasets import split
    from vit_common.errors import InputError

    if parts["train"].problem_type != "single_label_classification":
        raise InputError("vit probe needs images of one class each; given other labels.")
    if "test" in parts:
        return parts, "test"
    if "val" in parts:
        say(f"{options.names[0]}: no test images, so the validation images are tested on")
        return {"train": parts["train"], "test": parts["val"]}, "val"
    train, test = split(parts["train"], options.test_share, options.seed)
    say(
        f"{options.names[0]}: {len(test)} of {counted(len(parts['train']))} are held out and "
        f"tested on (--test-share, --seed)"
    )
    return {"train": train, "test": test}, f"{options.test_share} held out"


def _check_pool(pool: str | None, config: Any) -> None:
    from vit_common.errors import InputError

    if pool in ("cls", "cls+mean") and not config.use_cls_token:
        raise InputError(
            f"--pool {pool}: this network has no class token; wanted --pool mean, or none."
        )


def _features(
    encoder: Any, parts: dict[str, Any], options: Options
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[tuple[str, str]]]:
    """Features (N, D) and labels (N,) of the images of each part that can be read."""
    from vit_cli.terminal.progress import Progress
    from vit_common.features import features_pool, pooled_tokens

    pool = options.pool or features_pool(encoder.config)
    both = pool == "cls+mean"
    found, skipped = {}, []
    with Progress(sum(map(len, parts.values())), what="features") as bar:
        for part, dataset in parts.items():
            rows, labels = [], []
            images = (dataset.image(i) for i in range(len(dataset)))
            results = encoder.stream_features(
                images, options.layers, None if both else pool, options.batch_size
            )
            for i, result in enumerate(results):
                bar.advance(1)
                if result.error is not None:
                    skipped.append((dataset.names[i], str(result.error)))
                    continue
                values = result.value
                if both:
                    tokens = values.reshape(-1, *values.shape[-2:])  # (layers, S, D)
                    pooled = [pooled_tokens(tokens, encoder.config, p) for p in ("cls", "mean")]
                    values = np.concatenate(pooled, axis=1)
                rows.append(np.ravel(values))
                labels.append(dataset.labels[i])
            found[part] = np.array(rows, np.float32), np.array(labels, np.int64)
    return found, skipped


def _probe(
    features: dict[str, tuple[np.ndarray, np.ndarray]],
    classes: tuple[str, ...],
    options: Options,
) -> list[Any]:
    from vit_flax.training.probe import CHOICES, Features, probe

    parts = {name: Features(*each) for name, each in features.items()}
    return probe(
        parts["train"],
        parts["test"],
        classes,
        validation=parts.get("val"),
        neighbours=options.neighbours,
        C=options.C or CHOICES,
    )


def _summary(
    options: Options,
    config: Any,
    parts: dict[str, Any],
    features: dict[str, tuple[np.ndarray, np.ndarray]],
    test: str,
    skipped: list[tuple[str, str]],
    found: list[Any],
) -> dict[str, Any]:
    """Everything, as JSON has it."""
    from vit_common.features import features_pool

    kept = ("top1", "top5", "balanced_accuracy", "f1")
    return {
        "model": options.model or "the digits model of the package",
        "source": options.names[0],
        "pool": options.pool or features_pool(config),
        "layers": list(options.layers),
        "features": features["train"][0].shape[1],
        "classes": list(parts["train"].classes),
        "images": {name: len(each[1]) for name, each in features.items()},
        "tested_on": test,
        "skipped": [{"file": name, "error": message} for name, message in skipped],
        "probes": [
            {
                "probe": each.name,
                **{name: each.metrics[name] for name in kept},
                "per_class": each.metrics["per_class"],
                "settings": {
                    **each.settings,
                    **_as_pairs(each.settings.get("validation")),
                },
            }
            for each in found
        ],
    }


def _as_pairs(validation: dict[float, float] | None) -> dict[str, Any]:
    if validation is None:
        return {}
    return {"validation": [{"C": C, "log_loss": loss} for C, loss in validation.items()]}


def _print(summary: dict[str, Any]) -> None:
    from vit_cli.reports.evaluation import number, print_table
    from vit_cli.terminal.messages import one_line, printable

    images = ", ".join(f"{count} {name}" for name, count in summary["images"].items())
    print(
        f"{one_line(str(summary['model']))} on {printable(summary['source'])}: "
        f"{summary['features']} features ({summary['pool']}), {len(summary['classes'])} classes, "
        f"{images} images"
    )
    print()
    print_table(
        ["probe", "top-1", "top-5", "balanced accuracy", "settings"],
        [
            [
                each["probe"],
                number(each["top1"]),
                number(each["top5"]),
                number(each["balanced_accuracy"]),
                _settings(each["settings"], "val" in summary["images"]),
            ]
            for each in summary["probes"]
        ],
    )


def _settings(settings: dict[str, Any], validated: bool) -> str:
    if "C" in settings:
        where = "validation images" if validated else "a fifth of the training images"
        chosen = f" (chosen on {where})" if "validation" in settings else ""
        return f"C = {settings['C']:g}{chosen}"
    if "temperature" in settings:
        return f"votes exp(cosine / {settings['temperature']})"
    return "one vote each"
