"""Compare the twins on given weights; a face of `vit_torch.verify.parity`, which needs JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_torch.verify.parity import ParityReport, Stage, compare, difference

__all__ = ["ParityReport", "Stage", "compare", "difference"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from vit_torch.verify import parity

        return getattr(parity, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
