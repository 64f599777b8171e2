"""One module a family of files, each a table; `FORMATS` is what the converter knows.

To add a format: a module with its `FORMATS` (see `format.py`), its line below, a test.
"""

from __future__ import annotations

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.parameters import Head
from vit_convert.formats import (
    beit,
    deit,
    dino,
    dinov2,
    dinov3,
    eva,
    flax,
    google,
    huggingface,
    keras_hub,
    mae,
    moco,
    open_clip,
    timm,
    torchvision,
)
from vit_convert.formats.flax import TREE
from vit_convert.formats.format import Files, Format, Found

FORMATS: tuple[Format, ...] = (
    *huggingface.FORMATS,
    *flax.FORMATS,
    *timm.FORMATS,
    *deit.FORMATS,
    *dino.FORMATS,
    *mae.FORMATS,
    *moco.FORMATS,
    *beit.FORMATS,
    *dinov2.FORMATS,
    *dinov3.FORMATS,
    *eva.FORMATS,
    *open_clip.FORMATS,
    *torchvision.FORMATS,
    *google.FORMATS,
    *keras_hub.FORMATS,
)
"""Every table: one for each layout and family."""

PREPARED = (google.unstacked, mae.folded, keras_hub.numbered)
"""What is done to the tensors of a file before its format is detected."""

NAMES: tuple[str, ...] = tuple(dict.fromkeys(table.name for table in FORMATS))
"""Names of the formats, as users call them."""

WRITTEN: tuple[str, ...] = tuple(dict.fromkeys(table.name for table in FORMATS if table.written))
"""Names of those that can be written."""

FILES: dict[str, Files] = {table.name: table.files for table in FORMATS if table.written}
"""Format that can be written -> how its files lie on a disk."""

DESCRIBED: tuple[str, ...] = tuple(name for name in WRITTEN if FILES[name].described)
"""Those of Transformers, whose folders have a `config.json` in its words."""

DEFAULT = DESCRIBED[0]
"""What a folder gets where no format is named."""


def check_format(name: str) -> str:
    """The name itself.

    Raises:
        InputError: there is no such format to write.
    """
    if name in NAMES and name not in WRITTEN:
        raise InputError(
            f"the format {name!r} is read here, but not written; wanted one of "
            f"{', '.join(WRITTEN)}."
        )
    if name not in WRITTEN:
        raise InputError(f"the format must be one of {', '.join(WRITTEN)}; given {name!r}.")
    return name


def table_for(name: str, config: ViTConfig, head: Head | None = None) -> Format:
    """The table that writes weights of that configuration in a format.

    Args:
        name: one of `WRITTEN`.
        config: what the network is.
        head: what stands on it, as in `parameter_shapes`.

    Raises:
        InputError: there is no such format, it is only read, or it cannot hold that family.
    """
    check_format(name)
    written = [table for table in FORMATS if table.name == name and table.written]
    fitting = [table for table in written if config.base_family in table.families]
    if not fitting:
        families = ", ".join(dict.fromkeys(f for table in written for f in table.families))
        raise InputError(
            f"the format {name!r} holds the families {families}; these weights are of "
            f"{config.model_type!r}."
        )
    chosen = next((t for t in fitting if t.fits is None or t.fits(config, head)), fitting[0])
    return chosen if chosen.for_writing is None else chosen.for_writing(chosen, config)


__all__ = [
    "DEFAULT",
    "DESCRIBED",
    "FILES",
    "FORMATS",
    "NAMES",
    "PREPARED",
    "TREE",
    "WRITTEN",
    "Files",
    "Format",
    "Found",
    "check_format",
    "table_for",
]
