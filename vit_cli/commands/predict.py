"""`vit predict`: image files in, predictions out.

Results go to standard output in the order of the files; everything else goes to standard error.
"""

from __future__ import annotations

from vit_cli.models import load_for_stream
from vit_cli.options import Options, Parser, StreamOptions, add_ray, add_results, add_stream
from vit_cli.terminal.results import printer_of


def add_options(parser: Parser) -> None:
    parser.usage = "vit predict [options] IMAGE|DIR ..."
    parser.description = (
        "Classify images: print the most likely classes of each, in the order given. Images that "
        "cannot be read are named on standard error and skipped; the exit code is then 1."
    )
    add_results(parser, "classes")
    add_stream(parser, same="--top-k")
    add_ray(parser)

    def check(options: Options) -> None:
        if options.output is None and (options.resume or options.force):
            parser.error("--resume and --force are for --output FILE")

    parser.checks.append(check)


def run(options: Options) -> int:
    """Classify image files and print what they show, or write it to a file.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded.
        HostError: another process did not come, or stopped.
    """
    from vit_cli.runs.job import Job, Work
    from vit_cli.runs.prediction_file import Journal

    stream = StreamOptions.of(options)
    if options.on == "ray":
        from vit_cli.runs.ray_run import run_on_ray

        return run_on_ray(options, stream, "ImagePredictions", {"top_k": options.top_k})

    def begin(files: list[str]) -> Work:
        classifier = load_for_stream("ImageClassifier", stream, files)
        size = stream.batch_size or classifier.default_batch_size
        printer = None
        if stream.output is None:
            printer = printer_of(options.json, files, classifier.config.id2label.values())
        return Work(classifier.stream(files, top_k=options.top_k, batch_size=size), size, printer)

    return Job(stream, {"top_k": options.top_k}, begin, Journal, what="classifying").run()
