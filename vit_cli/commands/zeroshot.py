"""`vit zeroshot`: image files and texts in, the probability of each text for each image out.

Results go to standard output in the order of the files, as those of `vit predict` do; everything
else goes to standard error.
"""

from __future__ import annotations

from vit_cli.models import load_for_stream
from vit_cli.options import Options, Parser, StreamOptions, add_results, add_stream
from vit_cli.terminal.results import printer_of
from vit_common.files.labels import read_labels, texts_of


def add_options(parser: Parser) -> None:
    parser.usage = 'vit zeroshot [options] IMAGE|DIR ... --model NAME --labels "a cat,a dog"'
    parser.description = (
        "Classify images by texts, with a model of images and texts such as CLIP, which needs no "
        "training for it: print the likeliest texts for each image, in the order given. Images "
        "that cannot be read are named on standard error and skipped; the exit code is then 1."
    )
    parser.add_argument(
        "--labels", metavar="TEXT,TEXT", help="the texts to choose from, with commas between"
    )
    parser.add_argument(
        "--labels-file",
        metavar="FILE",
        help="file with the texts to choose from: one per line, or JSON",
    )
    parser.add_argument(
        "--template",
        metavar="TEXT",
        default="{}",
        help='what each label is put into at its {}: "a photo of a {}" (default: the label alone)',
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder or name on the Hub of the tokenizer (default: the model's own)",
    )
    add_results(parser, "texts")
    add_stream(parser, same="--labels, --template, --top-k")

    def check(options: Options) -> None:
        if options.model is None:
            parser.error(
                "name a model of images and texts with --model, such as "
                "openai/clip-vit-base-patch32"
            )
        if (options.labels is None) == (options.labels_file is None):
            given = "nothing" if options.labels is None else "both"
            parser.error(f"give the texts by --labels or --labels-file; given {given}")
        if options.output is None and (options.resume or options.force):
            parser.error("--resume and --force are for --output FILE")

    parser.checks.append(check)


def run(options: Options) -> int:
    """Find the likeliest texts for image files and print them, or write them to a file.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded, or the labels are none.
        HostError: another process did not come, or stopped.
    """
    from vit_cli.runs.job import Job, Work
    from vit_cli.runs.prediction_file import Journal

    stream = StreamOptions.of(options)
    given = {"labels": _labels(options), "template": options.template}
    texts_of(**given)  # before the seconds that JAX takes
    settings = {**given, "top_k": options.top_k}
    if options.tokenizer is not None:
        settings["tokenizer"] = options.tokenizer

    def begin(files: list[str]) -> Work:
        classifier = load_for_stream(
            "ZeroShotClassifier", stream, files, **given, tokenizer=options.tokenizer
        )
        size = stream.batch_size or classifier.default_batch_size
        printer = None
        if stream.output is None:
            printer = printer_of(options.json, files, classifier.labels)
        return Work(classifier.stream(files, top_k=options.top_k, batch_size=size), size, printer)

    return Job(stream, settings, begin, Journal, what="classifying").run()


def _labels(options: Options) -> list[str]:
    if options.labels_file is not None:
        return read_labels(options.labels_file)
    labels = [each.strip() for each in options.labels.split(",")]
    return [] if labels == [""] else labels
