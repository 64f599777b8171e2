"""One module a family of files; each is a table. `FORMATS` is what the engine knows."""

from convert.formats.flax import FLAX, FLAX_SAFETENSORS
from convert.formats.huggingface import HUB, HUB_V5
from convert.formats.timm import TIMM
from convert.rules import Format

FORMATS: dict[str, Format] = {
    table.name: table for table in (HUB, HUB_V5, FLAX, FLAX_SAFETENSORS, TIMM)
}
