"""What a conversion did, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vit_common.errors import some
from vit_convert.infer import Note

_NAMED = 8


@dataclass
class Verification:
    """What was compared after writing.

    Attributes:
        tensors: how many were read again, and found equal to the bit, or as the dtype rounds.
        logits_max_abs: largest difference between the outputs of source and target on one random
            image, or None where the network cannot be run in numpy.
        logits_scale: largest absolute output of the source.
    """

    tensors: int
    logits_max_abs: float | None = None
    logits_scale: float | None = None


@dataclass
class Report:
    """What a conversion did, or with `dry_run` would do.

    Attributes:
        source, target: the files; `written` names every file of the target.
        format_from, format_to: names of the formats; `describes` says the source's in words.
        family: `model_type`; `architecture` is the class that loads the result.
        tensors_read, tensors_written: numbers of tensors used and filled.
        parameters: numbers in them; `bytes` of the target's tensors; `dtype` of the target.
        set: what no configuration said: field, value, and what says so.
        ignored: name in the source -> why it was left aside.
        left_out: entry of the source that is no array of numbers -> what it is.
        warnings: what to know before using the result.
        preprocessing: where it comes from, or None where none is written.
        verification: None with `verify=False` or `dry_run`.
        seconds: the whole conversion, without verification.
    """

    source: str
    target: str
    format_from: str
    format_to: str
    describes: str
    family: str
    architecture: str
    tensors_read: int
    tensors_written: int
    parameters: int
    bytes: int
    dtype: str
    dry_run: bool = False
    written: list[str] = field(default_factory=list)
    set: list[Note] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    preprocessing: str | None = None
    verification: Verification | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        table = asdict(self)
        for note in table["set"]:
            note["value"] = _plain(note["value"])
        return table

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each line of the report for people."""
        yield "from", f"{self.source} ({self.format_from}: {self.describes})"
        would = "would write " if self.dry_run else ""
        yield "to", f"{would}{self.target} ({self.format_to}, {self.dtype})"
        yield "model", f"{self.family}, loads as {self.architecture}"
        yield (
            "tensors",
            f"{self.tensors_read} read, {self.tensors_written} written, {self.parameters:,} "
            f"parameters, {self.bytes / 1e6:,.1f} MB",
        )
        origins: dict[str, list[str]] = {}
        for note in self.set:
            origins.setdefault(note.origin, []).append(f"{note.field} = {_short(note.value)}")
        for origin, fields in origins.items():
            yield "set", f"{', '.join(fields)} (from: {origin})"
        reasons: dict[str, list[str]] = {}
        for name, why in self.ignored.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield "ignored", f"{', '.join(names[:_NAMED])}{more}: {why}"
        if self.left_out:
            yield "not read", f"{some(self.left_out, _NAMED)}: no arrays of numbers"
        if self.preprocessing:
            yield "images", f"preprocessing from: {self.preprocessing}"
        for text in self.warnings:
            yield "note", text
        for path in self.written:
            yield "wrote", path
        if self.verification is not None:
            text = f"{self.verification.tensors} tensors read again and equal"
            if self.verification.logits_max_abs is not None:
                difference = f"{self.verification.logits_max_abs:.1e}"
                scale = f"{self.verification.logits_scale:.3g}"
                text += f"; outputs of source and target differ by {difference}"
                text += f" (largest output {scale})"
            yield "verified", text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): each for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    if isinstance(value, dict) and len(value) > 3:
        first, *_, last = value.values()
        return f"{len(value)} labels, {first!r} ... {last!r}"
    return repr(value)
