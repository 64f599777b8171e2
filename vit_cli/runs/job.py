"""What `vit predict` and `vit features` have in common: images are found, shared out among
processes, put through a model, and what comes out is written."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vit_cli import cache
from vit_cli.runs.rows import RowFile, check_free
from vit_cli.runs.supervise import INTERRUPTION, Cluster, Hosts, join
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED, SOME_FAILED
from vit_cli.terminal.messages import counted, say
from vit_cli.terminal.progress import Progress
from vit_cli.terminal.results import Writer
from vit_common.errors import HostError
from vit_common.files.texts import reason
from vit_common.images.find import find_images

if TYPE_CHECKING:
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
    """A run over image files, and what a user may say of it.

    Attributes:
        names: image files, and folders of them.
        settings: what results depend on.
        begin: loads the model, and sets it to work on so many files.
        rows: makes the file of results, of `output` and what `RowFile` takes besides.
        what: is being done, beside the progress bar.
        output: file for the results; None is standard output.
        resume: go on with what an earlier run left of `output`.
        force: overwrite `output`.
        shard: (i, n): only the i-th of n parts of the files, counted from 0; which part a file is
            in, its name decides.
        cluster: processes that share the work, all started alike; they write one `output`.
    """

    names: list[str]
    settings: dict[str, Any]
    begin: Callable[[list[str]], Work]
    rows: Callable[..., RowFile]
    what: str
    output: str | None = None
    resume: bool = False
    force: bool = False
    shard: tuple[int, int] | None = None
    cluster: Cluster | None = None

    def run(self) -> int:
        """Do it; results come in the order of the files, and all else is said on standard error.

        Returns:
            The exit code: 1 if an image failed or a folder held none.

        Raises:
            ViTError: the model cannot be loaded, or the file not be written.
            HostError: another process did not come, or stopped.
        """
        faults = 0

        def report(text: str) -> None:
            nonlocal faults
            faults += 1
            say("error", text)

        files = list(find_images(self.names, report))
        if not files and self.cluster is None:
            return SOME_FAILED
        if self.shard is not None:
            files = own_shard(files, *self.shard)
        if self.output is not None:
            files = list(dict.fromkeys(files))
        if self.cluster is None:
            return self._run(files, faults, None)
        if self.cluster.process is not None and self.output is not None:
            check_free(self.output, self.cluster.process)  # before it disturbs those at work
        cache.enable()
        begin = {"output": self.output, "resume": self.resume, "force": self.force}
        return self._run(
            files, faults, join(self.cluster, {**self.settings, "images": self.names, **begin})
        )

    def _run(self, every: list[str], faults: int, hosts: Hosts | None) -> int:
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
                files = every
                failed = faults
                if self.output is not None:
                    target = self._open(self.output, hosts)
                    stack.callback(target.close)
                    if hosts is not None and hosts.index == 0:
                        hosts.tell("begun")
                    failed += target.failed
                    files = [file for file in files if file not in target.done]
                    if len(files) < len(every) and (hosts is None or hosts.index == 0):
                        say(f"{len(every) - len(files)} of {len(every)} images are done already")
                if hosts is not None:
                    files = [file for file in files if in_shard(file, hosts.index, hosts.count)]
                outcome = self._work(files, target, hosts)
                failed += outcome.failed
                if target is not None and hosts is not None:
                    failed += _finish_for_all(hosts, target, every, failed)
                    say(f"wrote {self.output}: {counted(outcome.done)} here")
                elif target is not None:
                    target.finish(every)
                    if summary := target.summary(len(every), outcome.done):
                        say(f"wrote {self.output}: {summary}")
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

    def _open(self, output: str, hosts: Hosts | None) -> RowFile:
        """The file for the results of this process; the first one's comes before all others'."""
        part = None
        if hosts is not None:
            part = (hosts.index, hosts.count)
            if hosts.index != 0:
                hosts.wait("begun")
        return self.rows(output, resume=self.resume, force=self.force, run=self.settings, part=part)

    def _work(self, files: list[str], target: RowFile | None, hosts: Hosts | None) -> _Outcome:
        """Do the files, and write what comes out.

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
                    say(f"interrupted: {done} of {counted(len(files))} done{how}")
                raise
            with progress.hidden():
                writer.flush()
        return _Outcome(done, failed)


def _finish_for_all(hosts: Hosts, target: RowFile, files: list[str], failed: int) -> int:
    """Make one file of the rows of all processes, in the first, when the last is done.

    Returns:
        In the first, how many images failed in the others.
    """
    if hosts.index != 0:
        target.end()
        hosts.tell(f"done/{hosts.index}", str(failed))
        hosts.wait("finished")
        return 0
    hosts.tell(f"done/{hosts.index}", "0")
    hosts.wait_for_all("done")
    target.finish(files)
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
