"""Which format is this? Told from the names of the whole file, never from one key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from convert.formats import FORMATS
from convert.rules import Format
from vit_common.errors import CheckpointError

_PROJECTION = "embeddings.patch_embeddings.projection.weight"


def detect_format(keys: Iterable[str]) -> Format:
    """The one format whose table knows the file's keys.

    A format is a candidate when it knows the patch projection under the name the file has; the
    candidate that leaves the fewest keys unknown is taken.

    Raises:
        CheckpointError: no format fits, or two fit equally well; the message says what was seen.
    """
    keys = list(keys)
    unknown: dict[str, int] = {}
    rules: dict[str, list[Any]] = {}
    for name, table in FORMATS.items():
        found = [table.rule_for_foreign(key) for key in table.strip(keys)]
        if any(hit and _PROJECTION in hit[0].canonical_names for hit in found):
            unknown[name] = sum(hit is None for hit in found)
            rules[name] = found
    best = [name for name, count in unknown.items() if count == min(unknown.values())]
    # Without blocks, formats that differ in the blocks alone say the same of every key.
    best = [name for i, name in enumerate(best) if i == 0 or rules[name] != rules[best[0]]]
    if len(best) == 1 and unknown[best[0]] <= len(keys) // 2:
        return FORMATS[best[0]]
    first = ", ".join(map(repr, sorted(keys)[:4])) or "no keys"
    known = "; ".join(f"{table.name}: {table.describes}" for table in FORMATS.values())
    if len(best) > 1:
        raise CheckpointError(
            f"these keys fit {' and '.join(best)} equally well ({first}, ...); say which it is."
        )
    raise CheckpointError(
        f"these are not the weights of a Vision Transformer in a format known here: it begins "
        f"with {first} ({len(keys)} keys). Known formats: {known}."
    )
