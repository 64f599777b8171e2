"""What `vit predict` and `vit features` have in common: images are found, shared out among
processes, put through a model, and what comes out is written."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vit_cli.runs.partial import check_free, check_output, is_whole
from vit_cli.runs.rows import RowFile
from vit_cli.runs.supervise import INTERRUPTION, Cluster, Hosts, join, supervised
from vit_cli.runtime import enable_cache
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED, SOME_FAILED
from vit_cli.terminal.messages import counted, say
from vit_cli.terminal.progress import Progress
from vit_cli.terminal.results import Writer
from vit_common.errors import ExistingFileError, HostError
from vit_common.files.texts import reason
from vit_common.images.find import find_images

if TYPE_CHECKING:
    from vit_cli.options import StreamOptions
    from vit_flax.inference import Result


class Work(NamedTuple):
    """What a model makes of images.

    Attributes:
        results: of each image, in order.
        batch_size: how many of them come at a time.
        printer: where they go if there is no file for them.
    """

    results: Generator[Result, None, None]
    batch_size: int
    printer: Writer | None = None


class _Outcome(NamedTuple):
    done: int
    failed: int


@dataclass(frozen=True)
class Job:
    """A run over image files.

    Attributes:
        stream: what the user says of it.
        settings: what results depend on, besides what `stream` says.
        begin: loads the model, and sets it to work on so many files.
        rows: makes the file of results, of `output` and what `RowFile` takes besides.
        what: is being done, beside the progress bar.
    """

    stream: StreamOptions
    settings: dict[str, Any]
    begin: Callable[[list[str]], Work]
    rows: Callable[..., RowFile]
    what: str

    def run(self) -> int:
        """Do it; results come in the order of the files, and all else is said on standard error.

        Returns:
            The exit code: 1 if an image failed or a folder held none.

        Raises:
            ViTError: the model cannot be loaded, or the file not be written.
            HostError: another process did not come, or stopped.
        """
        cluster = self.stream.cluster
        if cluster is None:
            return self._find(None)
        return supervised(cluster, lambda: self._find(cluster))

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.stream.settings, **self.settings}

    def _find(self, cluster: Cluster | None) -> int:
        """Find the images, and the other processes if there are any."""
        stream, faults = self.stream, 0

        def report(text: str) -> None:
            nonlocal faults
            faults += 1
            say("error", text)

        files = list(find_images(stream.names, report, say))
        if cluster is None:
            return self._run(files, faults)
        output = str(stream.output)
        kind: Any = getattr(self.rows, "func", self.rows)  # of a `functools.partial`
        check_output(output, kind.suffixes, kind.suffixes[0])
        if cluster.process is not None:  # before it disturbs those at work
            check_free(_part_name(output, *cluster.process))
        enable_cache()
        told = {
            **self._settings,
            "images": stream.names,
            # A process that finds other images would leave some out, or do them again.
            "images found": f"{len(files)}, checksum {_checksum(files):08x}",
            "output": stream.output,
            "resume": stream.resume,
            "force": stream.force,
        }
        return self._run(files, faults, join(cluster, told))

    def _run(self, files: list[str], faults: int, hosts: Hosts | None = None) -> int:
        """Do the files, or the share of them that this process of several has."""
        target: RowFile | None = None

        def end() -> None:
            try:
                if target is not None:
                    target.close()
            finally:
                if hosts is not None:
                    hosts.leave(INTERRUPTION)

        left: str | None = None  # why it stops before all is done
        try:
            with interrupt.exits_after(end), ExitStack() as stack:
                if not files:
                    return SOME_FAILED
                job = self if hosts is None else self._share(hosts)
                stream, failed = job.stream, faults
                if stream.shard is not None:
                    files = own_shard(files, *stream.shard)
                every = files
                if hosts is not None and stream.resume and is_whole(str(stream.output)):
                    say(f"{stream.output}: already there, and whole")
                    hosts.barrier("begun")
                    hosts.barrier("made")
                    return SOME_FAILED if failed else DONE
                if stream.output is not None:
                    every = list(dict.fromkeys(files))
                    target = self.rows(
                        stream.output, resume=stream.resume, force=stream.force, run=job._settings
                    )
                    stack.callback(target.close)
                    failed += target.failed
                    files = [file for file in every if file not in target.done]
                    if len(files) < len(every):
                        say(f"{len(every) - len(files)} of {len(every)} images are done already")
                if hosts is not None:
                    hosts.barrier("begun")  # before models are loaded: one may have been refused
                outcome = self._work(files, target, hosts, len(every) - len(files))
                failed += outcome.failed
                if target is not None:
                    # Until all are here rows are kept: --resume finds them where another stops.
                    target.finish(None if hosts is None else lambda: hosts.barrier("made"))
                    if summary := target.summary(len(every), outcome.done):
                        unread = failed - faults
                        also = f"; {counted(unread)} could not be read" if unread else ""
                        say(f"wrote {stream.output}: {summary}{also}")
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

    def _share(self, hosts: Hosts) -> Job:
        """The job of one of several processes: what `--shard I/N` and an output of its own make."""
        output = part_of(str(self.stream.output), hosts.index, hosts.count)
        stream = replace(self.stream, shard=(hosts.index, hosts.count), output=output)
        return replace(self, stream=stream)

    def _work(
        self, files: list[str], target: RowFile | None, hosts: Hosts | None, before: int
    ) -> _Outcome:
        """Do the files, and write what comes out.

        Args:
            files: images to do.
            target: where rows go; None is standard output.
            hosts: the other processes, if there are any.
            before: images that an earlier run has done, for the message about an interruption.

        Raises:
            KeyboardInterrupt: it was interrupted; that is said.
        """
        if not files:
            return _Outcome(0, 0)
        results, batch_size, printer = self.begin(files)
        writer = printer if target is None else target
        assert writer is not None
        done = failed = 0
        with Progress(len(files), show=hosts is None, what=self.what) as progress:
            try:
                with interrupt.raises() as asked, closing(results):
                    for result in results:
                        if asked():
                            raise KeyboardInterrupt
                        if hosts is not None:
                            hosts.check()
                        error = result.error
                        if error is None:
                            error = writer.write(result.source, result.value)
                        elif target is not None:
                            target.fail(result.source, str(error))
                        if error is not None:
                            failed += 1
                            progress.say("error", str(error))
                        done += 1
                        if done % batch_size == 0:  # they come a batch at a time
                            with progress.hidden():
                                writer.flush()
                            progress.advance(batch_size)
            except KeyboardInterrupt:
                with progress.hidden():
                    writer.flush()
                    kept = target is not None and (done or target.done)
                    how = "; --resume goes on from there" if kept else ""
                    total = counted(before + len(files))
                    say(f"interrupted: {before + done} of {total} done{how}")
                raise
            with progress.hidden():
                writer.flush()
        return _Outcome(done, failed)


def own_shard(files: list[str], index: int, count: int) -> list[str]:
    """The files in one of `count` parts; says so where there are none."""
    own = [file for file in files if in_shard(file, index, count)]
    if files and not own:
        say(f"no image falls to shard {index + 1}/{count}")
    return own


def in_shard(file: str, index: int, count: int) -> bool:
    """Whether a file is in one of `count` parts; the same for everyone who asks."""
    return zlib.crc32(os.fsencode(file)) % count == index


def part_of(output: str, index: int, count: int) -> str:
    """The file of one of `count` processes: `photos.1-of-2.jsonl` of `photos.jsonl`.

    Raises:
        ExistingFileError: another number of processes left files, which hold the same images.
    """
    path = Path(output)
    stem, suffix = map(re.escape, (path.stem, path.suffix))
    pattern = re.compile(rf"{stem}\.[1-9]\d*-of-([1-9]\d*){suffix}(\.partial)?")
    for other in sorted(path.parent.glob("*")):
        found = pattern.fullmatch(other.name)
        if found and int(found[1]) != count:
            raise ExistingFileError(
                f"{other}: written by one of {found[1]} processes, and these are {count}; images "
                f"would be in two files. Start {found[1]} processes, or delete what those wrote."
            )
    return _part_name(output, index, count)


def _part_name(output: str, index: int, count: int) -> str:
    path = Path(output)
    return str(path.with_name(f"{path.stem}.{index + 1}-of-{count}{path.suffix}"))


def _checksum(files: list[str]) -> int:
    return zlib.crc32(os.fsencode("\0".join(files)))
