"""One module a family of files; each is a table. `FORMATS` is what the engine knows."""

from __future__ import annotations

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_convert.formats import flax, google, huggingface, timm
from vit_convert.formats.flax import TREE
from vit_convert.rules import Format

FORMATS: tuple[Format, ...] = (
    *huggingface.FORMATS,
    *flax.FORMATS,
    *timm.FORMATS,
    *google.FORMATS,
)
"""Every table: one for each layout and family."""

NAMES: tuple[str, ...] = tuple(dict.fromkeys(table.name for table in FORMATS))
"""Names of the formats, as users call them."""


WRITTEN: tuple[str, ...] = tuple(dict.fromkeys(table.name for table in FORMATS if table.written))
"""Names of those that can be written."""


def check_format(name: str) -> str:
    """The name itself; InputError if there is no such format to write."""
    if name in NAMES and name not in WRITTEN:
        raise InputError(f"the format {name!r} is read here, but not written.")
    if name not in WRITTEN:
        raise InputError(f"the format must be one of {', '.join(WRITTEN)}; given {name!r}.")
    return name


def table_for(name: str, config: ViTConfig, head: str | None = None) -> Format:
    """The table that writes weights of that configuration in a format.

    Args:
        name: one of `WRITTEN`.
        config: what the network is.
        head: what stands on it, as in `parameter_shapes`.

    Raises:
        InputError: there is no such format, it is only read, or it cannot hold that family.
    """
    tables = FORMATS
    if check_format(name) == "google":
        tables = google.formats(config.num_attention_heads)
        tables = tables[1:] if config.position_tokens == "patches" else tables[:1]
    written = [table for table in tables if table.name == name and table.written]
    fitting = [table for table in written if config.model_type in table.families]
    if not fitting:
        families = ", ".join(dict.fromkeys(f for table in written for f in table.families))
        raise InputError(
            f"the format {name!r} holds the families {families}; these weights are of "
            f"{config.model_type!r}."
        )
    if len(fitting) > 1:  # DINOv2 with either MLP; BEiT with either head
        second = head == "tokens" if name == "beit" else config.use_swiglu_ffn
        return fitting[1 if second else 0]
    return fitting[0]


__all__ = ["FORMATS", "NAMES", "TREE", "WRITTEN", "Format", "check_format", "table_for"]
