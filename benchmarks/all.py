"""Every benchmark in turn, each in a process of its own; what cannot run here is named, and so is
what measures no time.

    python benchmarks/all.py [--quick] [--only NAME ...]

`--quick` tries each with a small network and writes nothing (a few minutes). Without it, it takes
hours on a machine of few cores. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time

from common import ROOT

OTHERS = {"coverage": "counts the networks of timm that are read, and measures no time"}
"""Scripts that are no benchmarks."""
COMPILER = "XLA's TPU compiler is not installed: pip install '.[tpu-check]'"
# name -> options, and a package that is needed
BENCHMARKS: dict[str, tuple[list[str], str | None]] = {
    "startup": ([], None),
    "parity": ([], None),
    "conversion": ([], None),
    "inference": ([], None),
    "int8_peers": ([], None),
    "training": ([], None),
    "scan": ([], None),
    "serving": ([], None),
    "tpu": ([], "libtpu"),
    "tpu_training": ([], "libtpu"),
}


def options_of(name: str, quick: bool) -> list[str]:
    """The options that a benchmark is run with."""
    if quick:
        return ["--quick"]
    if name == "scan" and importlib.util.find_spec("libtpu") is None:
        print(f"scan: its parts tpu and memory are left out: {COMPILER}", flush=True)
        return ["--parts", "cpu", "speed"]
    return BENCHMARKS[name][0]


def main() -> None:
    """Run them, and say which ran, failed and were left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks; writes nothing")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=[*BENCHMARKS])
    arguments = parser.parse_args()
    outcomes: dict[str, str] = {}
    for name in arguments.only:
        package = BENCHMARKS[name][1]
        if package is not None and importlib.util.find_spec(package) is None:
            outcomes[name] = f"left out: {COMPILER}"
            continue
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]
        command += options_of(name, arguments.quick)
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, check=False)
        seconds = time.perf_counter() - start
        result = "done" if done.returncode == 0 else f"FAILED (exit code {done.returncode})"
        outcomes[name] = f"{result}, {seconds:.0f} s"
    print("== all")
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome}")
    for name, what in OTHERS.items():
        print(f"{name:12} not run: it {what} (python benchmarks/{name}.py)")
    sys.exit(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
