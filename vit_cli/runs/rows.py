"""What `Journal` and `FeatureFile` have in common: one row per image, and a file made of them.

Rows go to `FILE.partial`, one JSON object per line. What a process that died left unfinished at its
end is cut off when the run is resumed; the file itself appears when every image is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from vit_cli.runs.partial import (
    PartialFile,
    check_begin,
    check_output,
    check_run,
    json_line,
    made_of,
    parse_line,
    told,
)
from vit_common.errors import ViTError
from vit_common.files.replace import delete_strays, replace_files


class RowFile:
    """The rows of one output file.

    A subclass says what a whole row is, and how a file is made of all of them.

    Args:
        path: the file; its suffix is its format.
        resume: go on with what an earlier run left.
        force: begin anew, and overwrite.
        run: what the rows are made with; a run with another cannot be resumed with this.

    Attributes:
        done: images that have a row.
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
    ) -> None:
        self.path = Path(path)
        self.done: set[str] = set()
        self.failed = 0
        self._run = run or {}
        self._partial = Path(f"{path}.partial")
        check_output(path, self.suffixes, self.suffixes[0])
        self._file = PartialFile(self._partial, header=json_line({"run": self._run}))
        self._beside: list[PartialFile] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            check_begin(path, self._partial, resume=resume, force=force)
            delete_strays(self.path)
            for end in self.beside:
                self._beside.append(PartialFile(Path(f"{self._partial}{end}"), alone=False))
            self._cut(self._recover() if resume else 0)
            undo.pop_all()

    # -- rows

    def _whole(self) -> Callable[[dict[str, Any]], bool]:
        """A function that says of each row of the partial file that holds no error, in turn,
        whether it is one of ours and all that it needs is there."""
        raise NotImplementedError

    def _recover(self) -> int:
        """Read what the run was, and the rows after it up to one that is not whole, or of an image
        that has a row already; returns where they end."""
        position = 0
        whole = self._whole()
        with told(self._partial, "read"), open(self._partial, "rb") as stream:
            for line in stream:
                row = parse_line(line)
                if row is None:
                    break
                if position == 0:
                    if [*row] != ["run"] or not isinstance(row["run"], dict):
                        break
                    check_run(self._partial, row["run"], self._run, self.what)
                else:
                    file = row.get("file")
                    if not isinstance(file, str) or file in self.done:
                        break
                    failed = [*row] == ["file", "error"] and isinstance(row["error"], str)
                    if not (failed or whole(row)):
                        break
                    self.done.add(file)
                    self.failed += failed
                position += len(line)
        return position

    def _cut(self, end: int) -> None:
        """Keep what is whole: so many bytes of rows."""
        self._file.cut(end)

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

    def finish(self, then: Callable[[], object] | None = None) -> None:
        """Make the file of the rows.

        Args:
            then: called when the file is there, before its rows are deleted. If it raises, they
                are kept.

        Raises:
            MissingFileError: it cannot be written; the rows are kept.
            InputError: safetensors, and the names are more than its header may hold.
        """
        write = self._ways()[self.path.suffix.lower()]
        try:
            if then is not None:
                self._file.write(b"")  # one without rows has its beginning, so it is kept, too
            for file in self._files:
                file.sync()
            with made_of(self._partial):
                replace_files(self.path.parent, {self.path.name: write})
            if then is not None:
                then()
            for file in self._files:  # the rows last: until then they keep other runs out
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

    def _lines(self) -> Iterator[bytes]:
        """The rows as they were written."""
        with open(self._partial, "rb") as stream:
            next(stream, None)  # what the run was
            yield from stream
