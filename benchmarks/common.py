"""What the benchmarks share: the machine's description, timing of processes, results files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
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
PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "safetensors"),
    *("onnxruntime", "openvino"),
)


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
        "instructions": instructions(),
        "instruction_sets": instruction_sets(),
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


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The options of a benchmark, all of which take `--quick`: a small network, few rounds, and
    nothing written, to see that the benchmark works.

    Args:
        parser: with the benchmark's own options.
        **quick: what `--quick` sets them to.
    """
    parser.add_argument(
        "--quick", action="store_true", help="a small network, few rounds; writes nothing"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(quick)
    return arguments


def machine(device: str = "cpu") -> str:
    """The kind of machine, for names of files: the processor, its widest instructions and number of
    cores, such as "intel-xeon-platinum-8481c-avx512-vnni-2-cores"; or the GPU."""
    if device == "gpu":
        try:
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            return slug(found.splitlines()[0])
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "gpu"
    return slug(f"{processor()} {instructions()} {os.cpu_count()} cores")


def slug(name: str) -> str:
    """A name in small letters, digits and dashes, without the marks that makers add."""
    name = re.sub(r"\((r|tm|c)\)|@.*?GHz|\b(cpu|processor)\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def instructions() -> str:
    """The widest vector instructions that the processor has; "" where nobody says."""
    flags = _flags()
    known = (
        ("amx_bf16", "amx"),
        ("avx512_bf16", "avx512-bf16"),
        ("avx512_vnni", "avx512-vnni"),
        ("avx512f", "avx512"),
        ("avx2", "avx2"),
        ("sve", "sve"),
        ("asimd", "neon"),
    )
    return next((name for flag, name in known if flag in flags), "")


def instruction_sets() -> list[str]:
    """All that the processor has for vectors and matrices, as the system names them."""
    known = r"(avx|amx|fma$|f16c$|sse4|sve|asimd|bf16|i8mm|vnni)"
    return sorted(flag for flag in _flags() if re.search(known, flag))


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/{name}-{machine}.json`, which runs on other kinds of machine leave
    as it is. The machine is that of the result's "device", the processor if it has none."""
    return write_file(f"{name}-{machine(result.get('device', 'cpu'))}", result)


def write_file(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/{name}.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return path
