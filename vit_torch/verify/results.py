"""What `verify` returns: stages with their bounds, rows, and the whole verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vit_torch.verify.diagnose import Cause
from vit_torch.verify.parity import Stage


@dataclass(frozen=True)
class Checked:
    """A stage, and the bound its difference must not exceed."""

    stage: Stage
    bound: float
    value: float

    @property
    def passed(self) -> bool:
        """Whether it is finite and within its bound."""
        return bool(np.isfinite([self.value, self.bound]).all()) and self.value <= self.bound


@dataclass
class Row:
    """One comparison.

    Attributes:
        device: device of the Flax model.
        dtype, precision: those of its matrix products.
        against: the model it was compared with.
        rule: kind of bound: "absolute", or "error ratio" in half precision.
        stages: stages in the order of the network.
        unmatched: stages that only one of the two has, or that differ in shape.
        causes: changes that reduce the difference of the first stage over its bound; empty if no
            known change does, None if none was tried.
    """

    device: str
    dtype: str
    precision: str
    against: str
    rule: str
    stages: list[Checked]
    unmatched: list[str] = field(default_factory=list)
    causes: list[Cause] | None = None

    @property
    def passed(self) -> bool:
        """Whether both have the same stages, and every one is within its bound."""
        within = all(checked.passed for checked in self.stages)
        return within and bool(self.stages) and not self.unmatched

    @property
    def first_over(self) -> Checked | None:
        """The first stage over its bound, or None."""
        return next((checked for checked in self.stages if not checked.passed), None)

    @property
    def agreeing(self) -> list[Cause]:
        """The causes that bring the first stage within its bound; a few at most."""
        over = self.first_over
        bound = 0.0 if over is None else over.bound
        return [cause for cause in self.causes or () if cause.after <= bound][:3]

    @property
    def worst(self) -> Checked | None:
        """The stage closest to its bound, or furthest over it; None where none was compared."""

        def part(checked: Checked) -> float:
            finite = np.isfinite([checked.value, checked.bound]).all()
            return checked.value / max(checked.bound, 1e-300) if finite else np.inf

        return max(self.stages, key=part, default=None)


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        first, second: the models; `second` is None where the twins of one were compared.
        family, head: `model_type` and head of the first.
        image_size, batch: (height, width) and number of the images.
        rows: one row per device, dtype and precision.
        versions: versions of the packages.
        notes: remarks for the reader.
    """

    first: str
    second: str | None
    family: str
    head: str | None
    image_size: tuple[int, int]
    batch: int
    rows: list[Row]
    versions: dict[str, str | None]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are rows, and every one is."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON, with None for numbers that are not finite."""
        table = _finite(asdict(self))
        table["passed"] = self.passed
        for row, own in zip(table["rows"], self.rows, strict=True):
            row["passed"] = own.passed
            over = own.first_over
            row["first_over"] = None if over is None else over.stage.name
            for stage, checked in zip(row["stages"], own.stages, strict=True):
                stage["passed"] = checked.passed
        return table


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
