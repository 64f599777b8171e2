"""The one table of bounds is the package's own, which `vit verify` uses too."""

from vit_torch.verify.bounds import BOUNDS

__all__ = ["BOUNDS"]
