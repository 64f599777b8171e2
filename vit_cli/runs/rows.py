"""What `Journal` and `FeatureFile` have in common: one row per image, written by one process or by
several, and one file made of the rows in the end.

Rows go to `FILE.partial`, one JSON object per line; those of several processes to
`FILE.1-of-2.partial` and so on, one for each. What a process that died left unfinished at its end
is cut off when the run is resumed, by as many processes as there are then; the file itself appears
when every image is done.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from vit_cli.runs.partial import (
    PartialFile,
    check_begin,
    check_output,
    check_run,
    claimed,
    json_line,
    made_of,
    parse_line,
    told,
)
from vit_common.errors import MissingFileError, ViTError
from vit_common.files.replace import delete_strays, replace_files

_HINT = " (Of several processes on one run, each needs its own --process I/N.)"


class RowFile:
    """The rows of one output file.

    A subclass says what a whole row is, and how a file is made of all of them.

    Args:
        path: the file; its suffix is its format.
        resume: go on with what an earlier run left.
        force: begin anew, and overwrite.
        run: what the rows are made with; a run with another cannot be resumed with this.
        part: (i, n) where n processes write, each its own rows, and this is the i-th from 0. The
            first begins before the others, and calls `finish` for all of them.

    Attributes:
        done: images that have a row, of whichever process.
        failed: how many of these rows hold an error.

    Raises:
        InputError: no such format, or parquet without pyarrow; or an earlier run was another.
        ExistingFileError: the file is there already, or a part of it without `resume` or `force`.
        MissingFileError: it cannot be written, or another process is writing it.
    """

    suffixes: ClassVar[tuple[str, ...]]
    """Of the formats; the first is what to write where pyarrow is missing."""
    what: ClassVar[str]
    """Rows of this kind, in messages."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of files that rows need besides their own."""

    def __init__(
        self,
        path: str,
        *,
        resume: bool = False,
        force: bool = False,
        run: dict[str, Any] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.path = Path(path)
        self.done: set[str] = set()
        self.failed = 0
        self._run = run or {}
        self._partial = _partial(path, part)
        self._places: list[tuple[Path, int]] | None = None
        first = part is None or part[0] == 0
        if first:
            check_output(path, self.suffixes, self.suffixes[0])
        header = json_line({"run": self._run})
        self._file = PartialFile(self._partial, header=header, hint=_HINT)
        self._beside: list[PartialFile] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            left = leftovers(path)
            others = [each for each in left if each != self._partial]
            if first:
                # Each run has one that looks at the files of all others after it has its own, so
                # that of two that begin at once one sees the other.
                with claimed(others, _HINT):
                    check_begin(path, left, resume=resume, force=force)
                    delete_strays(self.path)
                    if not resume:
                        self._delete(others)
            for end in self.beside:
                self._beside.append(PartialFile(Path(f"{self._partial}{end}"), alone=False))
            self._cut(self._recover(self._partial) if resume else 0)
            if resume:
                for other in others:
                    self._recover(other)
            undo.pop_all()

    # -- rows

    def _whole(self, partial: Path) -> Callable[[dict[str, Any]], bool]:
        """A function that says of each row of a partial file that holds no error, in turn, whether
        it is one of ours and all that it needs is there."""
        raise NotImplementedError

    def _whole_rows(self, partial: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
        """What the run was, and the rows after it up to one that is not whole, or of an image that
        has a row already; each with where its line begins and ends."""
        position = 0
        whole = self._whole(partial)
        seen: set[str] = set()
        with told(partial, "read"), open(partial, "rb") as stream:
            for line in stream:
                row = parse_line(line)
                if row is None:
                    return
                if position == 0:
                    if [*row] != ["run"] or not isinstance(row["run"], dict):
                        return
                else:
                    file = row.get("file")
                    if not isinstance(file, str) or file in seen:
                        return
                    failed = [*row] == ["file", "error"] and isinstance(row["error"], str)
                    if not (failed or whole(row)):
                        return
                    seen.add(file)
                yield row, position, position + len(line)
                position += len(line)

    def _recover(self, partial: Path) -> int:
        """Read what is whole; returns where it ends."""
        whole = 0
        for row, begin, end in self._whole_rows(partial):
            if begin == 0:
                check_run(partial, row["run"], self._run, self.what)
            elif row["file"] not in self.done:
                self.done.add(row["file"])
                self.failed += "error" in row
            whole = end
        return whole

    def _cut(self, end: int) -> None:
        """Keep of this process's files what is whole: so many bytes of rows."""
        self._file.cut(end if self.done else 0)

    def write(self, file: str, value: Any) -> ViTError | None:
        """The row of an image.

        Returns:
            Why the file cannot hold it, if so; that is its row then.
        """
        raise NotImplementedError

    def fail(self, file: str, error: str) -> None:
        """The row of an image that nothing could be made of."""
        if file not in self.done:
            self._row({"file": file, "error": error})
            self.failed += 1

    def _row(self, row: dict[str, Any]) -> None:
        if row["file"] in self.done:  # named twice, or by two folders
            return
        self.done.add(row["file"])
        self._file.write(json_line(row))

    @property
    def _files(self) -> list[PartialFile]:
        """Rows come after what they need: one without it is cut off. And they are locked."""
        return [*self._beside, self._file]

    def flush(self) -> None:
        """Hand the rows so far to the system; they survive the end of this process."""
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Keep what there is for `resume`; nothing where there is nothing."""
        with contextlib.ExitStack() as stack:  # each, whatever becomes of the one before it
            for file in reversed(self._files):
                stack.callback(file.close)

    # -- the file

    def end(self) -> None:
        """Hand the rows to the disk; what `finish` needs of every process but the first, which
        keep their files until it is done."""
        for file in self._files:
            file.sync()

    def finish(self, files: Iterable[str] = ()) -> None:
        """Make the file of the rows.

        Args:
            files: images in the order that the rows of several processes are to have.

        Raises:
            MissingFileError: it cannot be written, or one of the images has no row; the rows are
                kept.
            InputError: safetensors, and the names are more than its header may hold.
        """
        write = self._ways()[self.path.suffix.lower()]
        try:
            self.end()
            with made_of(self._partial):
                parts = leftovers(self.path)
                if parts != [self._partial]:
                    self._places = self._find(parts, list(dict.fromkeys(files)))
                replace_files(self.path.parent, {self.path.name: write})
            self._delete([part for part in parts if part != self._partial])
            for file in self._files:  # its own rows last: until then they keep other runs out
                file.discard()
        finally:
            self.close()

    def _ways(self) -> Mapping[str, Callable[[BinaryIO], object]]:
        """Writes the file, by its suffix."""
        raise NotImplementedError

    def summary(self, images: int, done: int) -> str:
        """What to say of the file at its end, if anything.

        Args:
            images: that the run was to do.
            done: by this process, just now.
        """
        raise NotImplementedError

    def _find(self, parts: list[Path], order: list[str]) -> list[tuple[Path, int]]:
        """Where the row of each image is: in which partial file, and from where on. Those in
        `order` come first."""
        where: dict[str, tuple[Path, int]] = {}
        failed = 0
        for part in parts:
            for row, begin, _ in self._whole_rows(part):
                if begin and row["file"] not in where:
                    where[row["file"]] = (part, begin)
                    failed += "error" in row
        absent = [file for file in order if file not in where]
        if absent:
            raise MissingFileError(
                f"{self.path}: {len(absent)} of {len(order)} images have no row, the first is "
                f"{absent[0]}: the processes did not find the same images."
            )
        self.done, self.failed = set(where), failed
        return [where[file] for file in dict.fromkeys((*order, *where))]

    def _lines(self) -> Iterator[tuple[Path, bytes]]:
        """The rows as they were written, and in which partial file: those of one process in their
        order, those of several in the order of the files."""
        if self._places is None:
            with open(self._partial, "rb") as stream:
                next(stream, None)  # what the run was
                for line in stream:
                    yield self._partial, line
            return
        with contextlib.ExitStack() as stack:
            parts = dict.fromkeys(part for part, _ in self._places)
            streams = {part: stack.enter_context(open(part, "rb")) for part in parts}
            for part, begin in self._places:
                streams[part].seek(begin)
                yield part, streams[part].readline()

    def _delete(self, parts: list[Path]) -> None:
        """Delete the files of other processes, and what is beside a file of rows that is gone."""
        for end in self.beside:
            for each in leftovers(self.path, end):
                part = Path(str(each).removesuffix(end))
                if part in parts or not part.exists():
                    with told(each, "deleted"):
                        each.unlink(missing_ok=True)
        for part in parts:
            with told(part, "deleted"):
                part.unlink(missing_ok=True)


def check_free(path: str, part: tuple[int, int]) -> None:
    """See that no other process writes the rows of this one.

    Raises:
        MissingFileError: one does.
    """
    with claimed([_partial(path, part)], _HINT):
        pass


def _partial(path: str, part: tuple[int, int] | None) -> Path:
    name = "partial" if part is None else f"{part[0] + 1}-of-{part[1]}.partial"
    return Path(f"{path}.{name}")


def leftovers(path: str | Path, end: str = "") -> list[Path]:
    """The files of rows of an output that is not whole yet, of one process or of several; or those
    beside them whose names end so."""
    path = Path(path)
    name = re.escape(path.name) + r"(\.[1-9]\d*-of-[1-9]\d*)?\.partial" + re.escape(end)
    pattern = re.compile(name)
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return [path.with_name(name) for name in sorted(names) if pattern.fullmatch(name)]
