"""timm, whose models are oracles here; imported through this module.

timm imports torchvision, whose compiled half needs a torch of another build than the one used on
machines without a GPU. Its Python half is enough for the models: the operators it registers
functions for are declared first, and never run. Both lie in a folder of their own (`make test` puts
them there), where Transformers does not see them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import scipy.interpolate
import torch

sys.path.append(str(Path(sys.prefix) / "oracles"))

_library = torch.library.Library("torchvision", "DEF")
_MISSING = "operator torchvision::"


def _import_torchvision() -> None:
    for _ in range(100):
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            if _MISSING not in str(error):
                raise
            name = str(error).split(_MISSING)[1].split()[0]
            _library.define(f"{name}(Tensor x) -> Tensor")
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]


_import_torchvision()

import timm  # noqa: E402

__all__ = ["as_microsoft", "timm"]


def _interp2d(x, y, z, kind):
    """`scipy.interpolate.interp2d`, which scipy 1.14 took away, as its guide says to replace it:
    https://docs.scipy.org/doc/scipy/tutorial/interpolate/interp_transition_guide.html"""
    assert kind == "cubic"
    spline = scipy.interpolate.RectBivariateSpline(x, y, z.T, kx=3, ky=3)
    return lambda new_x, new_y: spline(new_x, new_y).T


def as_microsoft(monkeypatch):
    """Let timm resample tables of relative positions by scipy's cubic splines, as the code that it
    has from microsoft/unilm does (`beit/run_class_finetuning.py`), instead of linearly."""
    monkeypatch.setattr(timm.layers.pos_embed_rel, "_USE_SCIPY", True)
    monkeypatch.setattr(scipy.interpolate, "interp2d", _interp2d, raising=False)
