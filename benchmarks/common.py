"""What the benchmarks share: the machine's description, timing of processes, results files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, processor and commit; no name of the machine."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run_process(command: Sequence[str]) -> dict[str, Any]:
    """Run a command to its end: wall seconds, peak resident megabytes, and what it printed.

    Raises:
        RuntimeError: it failed; the message holds its standard error.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=tempfile.gettempdir())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0), errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read().decode()[-3000:]}")
        return {
            "seconds": seconds,
            "peak_mb": usage.ru_maxrss / 1024,
            "stdout": output.read().decode(),
        }


def require_agreement(differences: Mapping[str, float], bound: float) -> None:
    """End the process where a contender's answer is further off than `bound`, or no number."""
    if not all(difference <= bound for difference in differences.values()):
        sys.exit(f"the contenders disagree: {dict(differences)}; wanted at most {bound:g}")


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and all samples."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": [round(sample, 4) for sample in samples],
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """theirs / ours, round by round: above one, ours is the smaller."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/{name}.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return path
