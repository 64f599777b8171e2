"""Zip archives, for the containers that are one: opened without taking more memory than they are
worth, and where a member's bytes lie in the file."""

from __future__ import annotations

import io
import struct
import zipfile

from vit_common.errors import CheckpointError
from vit_common.files.containers.tensor import DataFile
from vit_common.files.texts import reason

MAX_DIRECTORY = 4 << 20
"""Bytes of an archive's directory, some 40,000 members. zipfile reads it at once, and makes ten
times as much of it; a checkpoint with the states of an optimizer has a few thousand members."""


class _Stream(io.RawIOBase):
    """A `DataFile` as zipfile reads it; nothing asks it for more than the directory may have."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise OSError("a place before the beginning of the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_DIRECTORY:
            raise self._file.fail(
                f"its zip directory takes {size} bytes, and at most {MAX_DIRECTORY} are read."
            )
        data = self._file.read(self._position, size)
        self._position += len(data)
        return data


def open_zip(file: DataFile) -> zipfile.ZipFile:
    """The archive; it is read through `file`, so it is closed with that.

    Raises:
        CheckpointError: it is truncated or corrupt, its members overlap, or it has far too many.
    """
    try:
        archive = zipfile.ZipFile(_Stream(file))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile has no one class for a broken archive
        raise file.fail(f"truncated or corrupt zip archive ({reason(error)}).") from error
    if sum(info.compress_size for info in archive.infolist()) > file.size:
        raise file.fail("its members overlap, or are larger than the archive; refused.")
    return archive


def data_offset(file: DataFile, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin.

    Raises:
        CheckpointError: the member is not where the directory says, or does not end in the file.
    """
    local = file.read(info.header_offset, 30) if info.header_offset >= 0 else b""
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise file.fail(f"member {info.filename!r} is not where the archive's directory says.")
    # The lengths of the name and of the extra field here need not be those of the directory.
    name, extra = struct.unpack("<HH", local[26:30])
    begin = info.header_offset + 30 + name + extra
    if file.read(info.header_offset + 30, name) != _name(info):
        raise file.fail(f"member {info.filename!r} has another name in front of its data.")
    if begin + info.compress_size > file.size:
        raise file.fail(f"truncated: member {info.filename!r} reaches past the end.")
    return begin


def _name(info: zipfile.ZipInfo) -> bytes:
    try:
        return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    except UnicodeEncodeError:
        return b""
