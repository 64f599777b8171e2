"""`vit predict`: image files in, predictions out."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from vit_cli import cache, interrupt
from vit_cli.exit_codes import DONE, INTERRUPTED, SOME_FAILED
from vit_cli.hosts import INTERRUPTION, Cluster, Hosts
from vit_cli.journal import Journal, check_free
from vit_cli.messages import counted, say
from vit_cli.models import load_for_inference, settings
from vit_cli.progress import Progress
from vit_cli.results import JsonLines, PlainText, Table, Writer
from vit_cli.sources import find_images
from vit_common.errors import HostError
from vit_common.files import reason


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
        output: file for the results instead of standard output; see `vit_cli.journal`.
        resume: go on with what an earlier run left of `output`.
        force: overwrite `output`.
        shard: (i, n): only the i-th of n parts of the files, counted from 0; which part a file is
            in, its name decides.
        devices: how many of this process's devices to use; None is all.
        model_parallel: devices that one copy of the network is split over.
        cluster: processes that share the work, all started alike; they write one `output`.
        hub: more options of `from_pretrained`: those of the Hub, `param_dtype`, `weights`.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded.
        HostError: another process did not come, or stopped.
    """
    failed = 0

    def report(text: str) -> None:
        nonlocal failed
        failed += 1
        say("error", text)

    files = list(find_images(names, report))
    if not files and cluster is None:
        return SOME_FAILED
    if shard is not None:
        files = own_shard(files, *shard)
    if output is not None:
        files = list(dict.fromkeys(files))
    run = {**settings(model, dtype, hub, shard), "top_k": top_k}
    hosts: Hosts | None = None
    journal: Journal | None = None
    if cluster is not None:
        if cluster.process is not None and output is not None:
            check_free(output, cluster.process)  # before it disturbs those that are at work
        cache.enable()
        begin = {"images": names, "output": output, "resume": resume, "force": force}
        hosts = Hosts(cluster, {**run, **begin})

    def end() -> None:
        try:
            if journal is not None:
                journal.close()
        finally:
            if hosts is not None:
                hosts.leave_interrupted()

    left: str | None = None  # why it stops before all is done
    try:
        with interrupt.exits_after(end), ExitStack() as stack:
            every = files
            if output is not None:
                if hosts is not None and hosts.index != 0:
                    hosts.wait("begun")
                part = None if hosts is None else (hosts.index, hosts.count)
                journal = Journal(output, resume=resume, force=force, run=run, part=part)
                stack.callback(journal.close)
                if hosts is not None and hosts.index == 0:
                    hosts.tell("begun")
                failed += journal.failed
                files = [file for file in files if file not in journal.done]
                if len(files) < len(every) and (hosts is None or hosts.index == 0):
                    say(f"{len(every) - len(files)} of {len(every)} images are done already")
            if hosts is not None:
                files = [file for file in files if in_shard(file, hosts.index, hosts.count)]

            def load() -> Any:
                return load_for_inference(
                    "ImageClassifier",
                    model,
                    dtype,
                    hub,
                    devices=devices,
                    model_parallel=model_parallel,
                )

            outcome = _run(files, load, journal, hosts, top_k, batch_size, as_json=as_json)
            failed += outcome.failed
            if journal is not None:
                if hosts is None:
                    journal.finish(every)
                else:
                    failed += _finish_for_all(hosts, journal, every, failed)
                if hosts is not None:
                    say(f"wrote {output}: {counted(outcome.done)} here")
                elif outcome.done:
                    say(f"wrote {output}: {counted(len(every))}")
            return SOME_FAILED if failed else DONE
    except KeyboardInterrupt:
        left = INTERRUPTION
        return INTERRUPTED
    except HostError:  # the others know it too
        raise
    except BaseException as error:
        left = reason(error)
        raise
    finally:
        if hosts is not None:
            hosts.leave(left)


class _Outcome(NamedTuple):
    done: int
    failed: int


def _run(
    files: list[str],
    load: Callable[[], Any],
    journal: Journal | None,
    hosts: Hosts | None,
    top_k: int,
    batch_size: int | None,
    *,
    as_json: bool,
) -> _Outcome:
    """Classify the files, and write what comes out.

    Raises:
        KeyboardInterrupt: it was interrupted; that is said.
    """
    if not files:
        return _Outcome(0, 0)
    classifier = load()
    batch_size = batch_size or classifier.default_batch_size
    rich = _has_rich()
    writer: Writer
    if journal is not None:
        writer = journal
    else:
        writer = _writer(as_json, files, classifier.config.id2label, rich=rich)

    done = failed = 0
    results = classifier.stream(files, top_k=top_k, batch_size=batch_size)
    with Progress(len(files), show=rich and hosts is None) as progress:
        try:
            with interrupt.raises() as asked, closing(results):
                for result in results:
                    if asked():
                        raise KeyboardInterrupt
                    if hosts is not None:
                        hosts.check()
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
                kept = journal is not None and (done or journal.done)
                how = "; --resume goes on from there" if kept else ""
                say(f"interrupted: {done} of {counted(len(files))} done{how}")
            raise
        with progress.hidden():
            writer.flush()
    return _Outcome(done, failed)


def _finish_for_all(hosts: Hosts, journal: Journal, files: list[str], failed: int) -> int:
    """Make one file of the rows of all processes, in the first, when the last is done.

    Returns:
        In the first, how many images failed in the others.
    """
    if hosts.index != 0:
        journal.end()
        hosts.tell(f"done/{hosts.index}", str(failed))
        hosts.wait("finished")
        return 0
    hosts.tell(f"done/{hosts.index}", "0")
    hosts.wait_for_all("done")
    journal.finish(files)
    hosts.tell("finished")
    return sum(map(int, hosts.told("done").values()))


def own_shard(files: list[str], index: int, count: int) -> list[str]:
    """The files in one of `count` parts; says so where there are none."""
    own = [file for file in files if in_shard(file, index, count)]
    if files and not own:
        say(f"no image falls to shard {index + 1}/{count}")
    return own


def in_shard(file: str, index: int, count: int) -> bool:
    """Whether a file is in one of `count` parts; the same for everyone who asks."""
    return zlib.crc32(os.fsencode(file)) % count == index


def _has_rich() -> bool:
    """Whether rich is installed; says so where it would be used and is not."""
    if importlib.util.find_spec("rich") is not None:
        return True
    if sys.stdout.isatty():
        say("warning", "tables and progress bars need rich; run: pip install rich")
    return False


def _writer(as_json: bool, files: list[str], labels: Mapping[int, Any], *, rich: bool) -> Writer:
    if as_json:
        return JsonLines(sys.stdout)
    if rich and sys.stdout.isatty():
        return Table(sys.stdout, files, map(str, labels.values()))
    return PlainText(sys.stdout, files)
