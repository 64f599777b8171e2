"""How many threads to use."""

from __future__ import annotations

import os


def usual_workers(share: int = 1) -> int:
    """Threads to decode with: one for every `share` of the processor's cores, at most 16."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(16, max(1, cores // share))
