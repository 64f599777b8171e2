"""The instruction sets that a processor reports."""

from __future__ import annotations

from functools import cache


@cache
def processor_flags() -> frozenset[str]:
    """The instruction sets that Linux reports; none elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()
