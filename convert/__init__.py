"""Maps between checkpoint layouts: numpy in, numpy out, no framework.

`convert.convert(source, target)` is what the command `vit convert` calls.
"""

from convert.convert import convert
from convert.report import Report, Verification

__all__ = ["Report", "Verification", "convert"]
