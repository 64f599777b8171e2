"""Pickles, read without running anything: what they name is neither imported nor called.

A pickle is a program for a small machine with a stack. Here the machine makes numbers, texts,
lists, tuples and mappings, and of everything else a record of what it was said to be: an `Inert`.
Tensors and their storages are described by `TensorAt` and `Storage`. A name that is neither part of
how torch saves tensors nor that of a plain value is refused: such a file was meant to run code.

Instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py, protocols 2 to 5.
"""

from __future__ import annotations

import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, NamedTuple

from vit_common.files.containers.tensor import DataFile

MAX_OPERATIONS = 3_000_000
"""Instructions of a pickle; a training state of a large network has some hundred thousand."""

_LONG_TEXT = 1 << 16
"""Bytes above which a text is skipped: names are shorter, and numpy's arrays need no reading."""

_LONG_NUMBER = 16
"""Bytes above which an integer is skipped; a hash of integers without end can be chosen."""


class Inert:
    """A value that is no tensor, mapping, list, number or text: only what it is called is kept."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Name(Inert):
    """Something that a pickle names, such as a function or a class; never imported."""

    __slots__ = ()


class Storage(NamedTuple):
    """Bytes of the file that tensors are views of."""

    key: str
    type: str
    """Of its numbers, in torch's words: "Float" of `torch.FloatStorage`; "Untyped" for bytes."""
    length: int
    """Numbers in it."""
    begin: int = 0
    """Numbers of the root storage before it; files from before torch 1.0 have such parts."""


class TensorAt(NamedTuple):
    """A dense tensor: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None
    """In torch's words, where the storage does not say it."""
    conjugate: bool
    negative: bool


class OddTensor(Inert):
    """A tensor that is sparse, quantized, or without numbers."""

    __slots__ = ()


class _Key:
    """Stands for a key that is neither a text nor a plain number: its hash cannot be chosen."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


MAPPINGS = {
    *("collections.OrderedDict", "collections.Counter", "collections.defaultdict"),
    *("builtins.dict", "types.MappingProxyType", "collections.UserDict"),
    *("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode"),
    *("easydict.EasyDict", "addict.addict.Dict"),
    *("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
}
"""Classes of mappings that are read as a dict."""

_PLAIN = re.compile(
    r"builtins\.(set|frozenset|bytes|bytearray|complex|slice|range|xrange|int|long|"
    r"float|str|unicode|bool|list|tuple|dict|object|NoneType|Ellipsis|NotImplemented)"
    r"|_codecs\.encode|copyreg\._reconstructor|collections\.deque"
    r"|argparse\.Namespace|types\.(SimpleNamespace|NoneType)|typing\.\w+"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.(UUID|SafeUUID)|re\._compile|zoneinfo\.ZoneInfo"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|numpy\.(dtype|ndarray|number|generic|bool_?|u?int(c|p|_|\d+)?|u?(byte|short|long|longlong)"
    r"|(c?(long)?double|half|single|csingle)|(float|complex)(_|\d+)?|str_|bytes_|void|datetime64"
    r"|timedelta64|longdouble|clongdouble|object_)"
    r"|numpy\.dtypes\.\w+DType"
    r"|numpy\.(ma\.core\.(MaskedArray|_mareconstruct))"
    r"|numpy\.(_?core)\.multiarray\.(scalar|_reconstruct)|numpy\.(_?core)\.numeric\._frombuffer"
    r"|numpy\.random\._pickle\.__(randomstate|bit_generator|generator)_ctor"
    r"|numpy\.random\._(mt19937\.MT19937|pcg64\.PCG64(DXSM)?|philox\.Philox|sfc64\.SFC64)"
    r"|numpy\.random\.bit_generator\.(SeedSequence|__pyx_unpickle_SeedSequence)"
    r"|torch\.(Size|device|dtype|layout|memory_format|serialization\._get_layout|Tensor|Generator)"
    r"|torch\.(u?int\d+|q?u?int\d+|bfloat16|float\d*\w*|complex\d+|bool|bits\w+|half|double|long)"
    r"|torch\.per_(tensor|channel)_\w+|torch\.(strided|sparse_\w+|contiguous_format|channels_last)"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch(\.cuda|\.storage)?\.(\w+Storage)|torch\._utils\._rebuild_\w+"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|omegaconf\.(\w+\.)?(DictConfig|ListConfig|ContainerMetadata|Metadata|\w+Node)"
    r"|ml_collections\.config_dict\.config_dict\.(Frozen)?ConfigDict"
    r"|mmengine\.logging\.history_buffer\.HistoryBuffer"
)
"""Names that stand for plain values; nothing of them is imported or called either."""

_STORAGE = re.compile(r"torch(?:\.cuda|\.storage)?\.(\w+)Storage")


class _Refused(Exception):
    """The pickle names something that is no plain value."""


class _Corrupt(Exception):
    """The pickle is no program for the machine."""


class Reader:
    """Reads pickles that stand one after the other in a file.

    Args:
        file: where they are.
        position: of the first byte.
        end: of the byte after the last one.
    """

    _WINDOW = 1 << 16

    def __init__(self, file: DataFile, position: int, end: int) -> None:
        self.file = file
        self.storages: dict[str, Storage] = {}
        """Every storage that was named, by its key; the whole of it."""
        self.position = position
        self._end = min(end, file.size)
        self._start, self._bytes = 0, b""
        self._operations = 0

    def load(self) -> Any:
        """The next object.

        Raises:
            CheckpointError: it is corrupt, truncated, without end, or asks for code; none was run.
        """
        try:
            return self._run()
        except _Refused as error:
            raise self.file.fail(
                f"its pickle asks for code or objects ({str(error)[:200]}), so it was refused and "
                "nothing in it was run. Save the weights alone: as safetensors, or with "
                "`torch.save(model.state_dict(), path)`."
            ) from error
        except (_Corrupt, IndexError, TypeError, ValueError, AttributeError, struct.error) as error:
            text = str(error) if isinstance(error, _Corrupt) else "its instructions do not fit"
            raise self.file.fail(
                f"corrupt: not a pickle that torch can have written ({text} at byte "
                f"{self.position})."
            ) from error

    # -- bytes

    def _take(self, count: int) -> bytes:
        begin = self.position - self._start
        if begin < 0 or begin + count > len(self._bytes):
            if self.position + count > self._end:
                raise _Corrupt("truncated")
            self._start = self.position
            size = min(max(count, self._WINDOW), self._end - self.position)
            self._bytes = self.file.read(self._start, size)
            begin = 0
            if len(self._bytes) < count:
                raise _Corrupt("truncated")
        self.position += count
        return self._bytes[begin : begin + count]

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        out = bytearray()
        while (byte := self._take(1)) != b"\n":
            out += byte
            if len(out) > 1000:
                raise _Corrupt("a name without end")
        return out.decode()

    def _skip(self, count: int) -> None:
        if self.position + count > self._end:
            raise _Corrupt("truncated")
        self.position += count

    # -- the machine

    def _run(self) -> Any:
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        while True:
            self._operations += 1
            if self._operations > MAX_OPERATIONS:
                raise _Corrupt(f"more than {MAX_OPERATIONS} instructions")
            code = self._take(1)
            if code == b".":
                return self.stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise _Corrupt(f"instruction 0x{code[0]:02x}, which torch does not write")
            operation(self)

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self._marks.pop()
        return items

    def _mark(self) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def _text(self, form: str) -> None:
        count = self._number(form)
        if count > _LONG_TEXT:
            self._skip(count)
            self._push(Inert("str"))
        else:
            self._push(self._take(count).decode("utf-8", "surrogatepass"))

    def _blob(self, form: str, text: bool = False) -> None:
        count = self._number(form)
        if count > _LONG_TEXT:
            self._skip(count)
            self._push(Inert("bytes"))
            return
        data = self._take(count)
        # Python 2 wrote its texts so.
        self._push(data.decode("utf-8", "backslashreplace") if text else data)

    def _integer(self, form: str) -> None:
        count = self._number(form)
        if count > _LONG_NUMBER:
            self._skip(count)
            self._push(Inert("int"))
        else:
            self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _put(self, form: str) -> None:
        self._memo[self._number(form)] = self.stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _get(self, form: str) -> None:
        number = self._number(form)
        if number not in self._memo:
            raise _Corrupt("a reference to nothing")
        self._push(self._memo[number])

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise _Corrupt("a tuple of nothing")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self._push(items)

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise _Corrupt(f"appends to a {kind_of(target)}")

    def _frozen_set(self) -> None:
        self._pop_mark()
        self._push(Inert("frozenset"))

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            if len(items) % 2:
                raise _Corrupt("a key without a value")
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[self._key(key)] = value
        elif not isinstance(target, Inert):
            raise _Corrupt(f"sets entries of a {kind_of(target)}")

    def _set_one(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _key(self, key: Any) -> Any:
        """The key itself where its hash cannot be chosen freely: others can make a few million
        entries take hours."""
        if isinstance(key, bytes):
            return key.decode("utf-8", "backslashreplace")
        if key is None or isinstance(key, (str, bool, float)):
            return key
        if isinstance(key, int) and abs(key) < 1 << 60:
            return key
        return _Key(f"({kind_of(key)} {self._operations})")

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise _Corrupt("a name that is no text")
        module, name = NAME_MAPPING.get(
            (module, name), (IMPORT_MAPPING.get(module, module), name)
        )  # protocol 2 has the names of Python 2
        whole = f"{module}.{name}"
        if whole not in MAPPINGS and not _PLAIN.fullmatch(whole):
            raise _Refused(whole)
        self._push(Name(whole))

    def _global(self) -> None:
        module = self._line()
        self._name(module, self._line())

    def _stack_global(self) -> None:
        name = self.stack.pop()
        self._name(self.stack.pop(), name)

    def _new(self, keywords: bool = False) -> None:
        if keywords:
            self.stack.pop()
        self._reduce()

    def _reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise _Corrupt(f"calls a {kind_of(called)}")
        self._push(self._made(called.name, arguments))

    def _build(self) -> None:
        self.stack.pop()
        target = self.stack[-1]
        # Of mappings these are attributes (the versions of a state dict); of tensors, before
        # torch 0.4, the numbers themselves.
        if not isinstance(target, (dict, Inert)) or isinstance(target, Name):
            raise _Corrupt(f"sets the state of a {kind_of(target)}")

    def _persistent(self) -> None:
        given = self.stack.pop()
        if not isinstance(given, tuple) or len(given) not in (5, 6):
            raise _Corrupt("a reference to data that is no storage")
        what, kind, key, _, count, *view = (_plain(each) for each in given)
        match = _STORAGE.fullmatch(kind.name) if isinstance(kind, Name) else None
        if what != "storage" or match is None or not isinstance(key, str) or not _is_size(count):
            raise _Corrupt("a reference to data that is no storage")
        begin = 0
        if view and view[0] is not None:
            whole_count = count
            _, begin, count = view[0]
            if not (_is_size(begin) and _is_size(count) and begin + count <= whole_count):
                raise _Corrupt("a part of a storage that is not in it")
        whole = Storage(key, match[1], given[4])
        if self.storages.setdefault(key, whole) != whole:
            raise _Corrupt(f"storage {key[:40]!r} has two sizes")
        self._push(Storage(key, match[1], count, begin))

    # -- what names stand for

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in MAPPINGS:
            return self._mapping(arguments)
        kind = name.rpartition(".")[2]
        if name == "torch.Size":
            return tuple(arguments[0])
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            metadata = arguments[6] if len(arguments) > 6 else None
            return _tensor(arguments[:4], None, metadata)
        if name == "torch._utils._rebuild_tensor_v3":
            dtype = arguments[6]
            if not isinstance(dtype, Name):
                raise _Corrupt("a tensor without a dtype")
            metadata = arguments[7] if len(arguments) > 7 else None
            return _tensor(arguments[:4], dtype.name.removeprefix("torch."), metadata)
        if name in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            "torch.nn.parameter.Parameter",
            "torch.nn.parameter.Buffer",
        ):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            called, _, inner, _ = arguments
            if not isinstance(called, Name) or not isinstance(inner, tuple):
                raise _Corrupt("a tensor made of nothing")
            return self._made(called.name, inner)
        if name.startswith("torch._utils._rebuild_") or name == "torch.Tensor":
            return OddTensor(kind)
        if name == "_codecs.encode" and arguments and isinstance(arguments[0], str):
            return arguments[0].encode("latin1", "backslashreplace")  # how protocol 2 has bytes
        return Inert(name.removeprefix("builtins."))

    def _mapping(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        table: dict[Any, Any] = {}
        for given in arguments:
            pairs = given.items() if isinstance(given, dict) else given
            if not isinstance(given, (dict, list, tuple)):
                continue  # the factory of a defaultdict
            for pair in pairs:
                if isinstance(pair, (list, tuple)) and len(pair) == 2:
                    table[self._key(pair[0])] = pair[1]
        return table


def _plain(value: Any) -> Any:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(map(_is_size, value)):
        raise _Corrupt("a shape that is no list of sizes")
    return tuple(value)


def _tensor(arguments: tuple[Any, ...], dtype: str | None, metadata: Any) -> TensorAt:
    storage, offset, shape, strides = arguments
    if not isinstance(storage, Storage) or not _is_size(offset):
        raise _Corrupt("a tensor without a storage")
    shape, strides = _sizes(shape), _sizes(strides)
    if len(shape) != len(strides):
        raise _Corrupt("a tensor whose shape and strides differ in length")
    flags = metadata if isinstance(metadata, dict) else {}
    return TensorAt(
        storage,
        offset,
        shape,
        strides,
        dtype,
        flags.get("conj") is True,
        flags.get("neg") is True,
    )


def kind_of(value: Any) -> str:
    """What a value of a pickle is, in a word or a dotted name."""
    if isinstance(value, TensorAt):
        return "Tensor"
    return value.name if isinstance(value, Inert) else type(value).__name__


_OPERATIONS: dict[bytes, Callable[[Reader], object]] = {
    b"\x80": lambda r: r._take(1),  # the protocol
    b"\x95": lambda r: r._take(8),  # the length of a frame
    b"(": Reader._mark,
    b"0": lambda r: r.stack.pop() if r.stack else r._pop_mark(),
    b"1": Reader._pop_mark,
    b"2": lambda r: r._push(r.stack[-1]),
    b"N": lambda r: r._push(None),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    b"J": lambda r: r._push(r._number("<i")),
    b"K": lambda r: r._push(r._number("<B")),
    b"M": lambda r: r._push(r._number("<H")),
    b"\x8a": lambda r: r._integer("<B"),
    b"\x8b": lambda r: r._integer("<I"),
    b"G": lambda r: r._push(r._number(">d")),
    b"X": lambda r: r._text("<I"),
    b"\x8c": lambda r: r._text("<B"),
    b"\x8d": lambda r: r._text("<Q"),
    b"T": lambda r: r._blob("<I", text=True),
    b"U": lambda r: r._blob("<B", text=True),
    b"B": lambda r: r._blob("<I"),
    b"C": lambda r: r._blob("<B"),
    b"\x8e": lambda r: r._blob("<Q"),
    b"\x96": lambda r: r._blob("<Q"),
    b"]": lambda r: r._push([]),
    b"a": lambda r: r._append([r.stack.pop()]),
    b"e": lambda r: r._append(r._pop_mark()),
    b"l": lambda r: r._push(r._pop_mark()),
    b")": lambda r: r._push(()),
    b"t": lambda r: r._push(tuple(r._pop_mark())),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"}": lambda r: r._push({}),
    b"s": Reader._set_one,
    b"u": lambda r: r._set(r._pop_mark()),
    b"\x8f": lambda r: r._push(Inert("set")),
    b"\x90": lambda r: r._append(r._pop_mark()),
    b"\x91": Reader._frozen_set,
    b"q": lambda r: r._put("<B"),
    b"r": lambda r: r._put("<I"),
    b"\x94": Reader._memoize,
    b"h": lambda r: r._get("<B"),
    b"j": lambda r: r._get("<I"),
    b"c": Reader._global,
    b"\x93": Reader._stack_global,
    b"R": Reader._reduce,
    b"\x81": Reader._new,
    b"\x92": lambda r: r._new(keywords=True),
    b"b": Reader._build,
    b"Q": Reader._persistent,
}
