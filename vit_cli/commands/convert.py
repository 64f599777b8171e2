"""`vit convert`: a checkpoint in one layout in, in another out."""

from __future__ import annotations

import argparse
import json

from vit_cli.options import DTYPES, Options, Parser, Reading, add_reading, positive
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED
from vit_cli.terminal.messages import say
from vit_cli.terminal.progress import Progress
from vit_cli.terminal.results import print_titled
from vit_common.files.labels import read_labels

# As `vit_convert.formats` has them; repeated here so that `--help` need not load it.
_WRITTEN = (
    "hub", "flax", "flax-safetensors", "timm", "deit", "dino", "beit", "dinov2", "dinov3",
    "open_clip", "torchvision", "google",
)  # fmt: skip
_BIG = 200_000_000
"""Bytes from which there is a progress bar."""


def add_options(parser: Parser) -> None:
    parser.usage = "vit convert [options] SOURCE TARGET"
    parser.description = (
        "Convert a checkpoint. TARGET is a file (.safetensors, .msgpack, .npz, .pth) or a folder, "
        "which also gets config.json and preprocessor_config.json. Every tensor is accounted for; "
        "the result is read again and compared before it replaces anything. A LoRA adapter (a "
        "folder of PEFT) is merged into its base model."
    )
    parser.add_names(
        "SOURCE TARGET",
        "what to convert (folder, weights file or name on the Hub), and where to write it",
        least=2,
        most=2,
        wanted="SOURCE and TARGET",
    )
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help=f"format to write: {', '.join(_WRITTEN)} (default: what the suffix says, and hub for "
        "a folder); or peft-4, peft-5: an adapter as it is, with the names of Transformers 4 or 5",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model of an adapter (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "float64"), help="dtype to write (default: the source's)"
    )
    parser.add_argument(
        "--num-labels", metavar="N", type=positive, help="name the N classes LABEL_0, LABEL_1 ..."
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes: one per line, or JSON"
    )
    parser.add_argument(
        "--preprocessing",
        metavar="FILE",
        help="how images are prepared, instead of what the source implies: a "
        "preprocessor_config.json, a model with one, or imagenet, inception or clip, if need be "
        "with a crop (imagenet:0.95)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="10GB",
        help="size of the largest file in a folder (default: 10GB)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="do everything except writing the result"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the result again, compare every tensor, and run source and result on one image",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_reading(parser, image_size="resample the positions to another image size")


def run(options: Options) -> int:
    """Convert and print the report.

    Raises:
        ViTError: it cannot be converted; nothing was written.
    """
    from vit_convert import convert

    reading = Reading.of(options, resized=True)
    labels = None if options.labels is None else read_labels(options.labels)
    try:
        with interrupt.raises(), Progress(what="converting", few=_BIG, in_bytes=True) as bar:
            report = convert(
                *options.names,
                to=options.to,
                from_=reading.format,
                dtype=options.dtype,
                num_labels=options.num_labels,
                labels=labels,
                image_size=options.image_size,
                ignore=reading.ignore,
                overrides=reading.overrides,
                preprocessing=options.preprocessing,
                base=options.base,
                dry_run=options.dry_run,
                verify=options.verify,
                force=options.force,
                max_shard_size=options.max_shard_size,
                progress=bar.reach,
                **reading.hub,
            )
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        return INTERRUPTED
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_titled(report.lines(), 10)
    return DONE
