"""How long does a training step take, beside its peers: forward, backward and AdamW's update?

    python benchmarks/training.py [--model tiny] [--batch 8] [--dtype float32] [--rounds 7]
        [--only NAME ...]

Every contender is a process of its own that begins with the same random weights and sees the same
batch. The losses of the first steps are compared before anything is timed; then they take turns, a
step each a round, in an order drawn anew. `tiny` is DeiT-Tiny's size. Seconds are those of the
clock and, fairer on a machine that does other things too, those of the processor over all cores;
torch's threads wait busily, and that counts in the latter. In bfloat16 the parameters are float32
in all of them (torch by autocast). The memory is the largest resident size during a step, less the
files that are mapped into it (the libraries' code). Writes
`results/training-MODEL-DTYPE-MACHINE.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from common import ROOT, parse, ratio, require_agreement, run_process, spread, write_result
from inference import MAKE, Contender, turns
from trainer import KINDS

OURS = "vit_flax"
STEPS = 4  # whose losses are compared
BOUNDS = {"float32": 2e-4, "bfloat16": 5e-2}  # of a loss near 7


def main() -> None:
    """Run, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=BOUNDS, default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    quick = ["Transformers FlaxViT", "Transformers torch, sdpa"]
    arguments = parse(parser, batch=2, rounds=1, only=quick)
    with tempfile.TemporaryDirectory() as path:
        make = MAKE.format(model=arguments.model, path=path)
        run_process(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{make}"]
        )
        contenders: list[Contender] = []
        losses, left_out = {}, {}
        for name in dict.fromkeys([OURS, *arguments.only]):
            try:
                options = [path, arguments.dtype, str(arguments.batch)]
                contender = Contender(name, sys.executable, options, script="trainer.py")
                losses[name] = contender.ask(f"losses {STEPS}")
            except RuntimeError as error:
                left_out[name] = str(error).strip().splitlines()[-1]
                print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
                continue
            contenders.append(contender)
        if OURS in left_out:
            sys.exit(f"there is nothing to compare with: {OURS} failed: {left_out[OURS]}")
        differences = {
            name: max(abs(a - b) for a, b in zip(losses[OURS], theirs, strict=True))
            for name, theirs in losses.items()
        }
        require_agreement(differences, BOUNDS[arguments.dtype])
        wall: dict[str, list[float]] = {c.name: [] for c in contenders}
        processor: dict[str, list[float]] = {c.name: [] for c in contenders}
        for _ in range(arguments.rounds):
            for contender in turns(contenders):
                seconds, cpu = contender.ask("step")
                wall[contender.name].append(seconds)
                processor[contender.name].append(cpu)
        memory = {c.name: c.ask("memory") for c in contenders}
        for contender in contenders:
            contender.close()
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.dtype}")
    for name in wall:
        print(
            f"  {name:30} {spread(wall[name])['median']:7.3f} s by the clock, "
            f"{spread(processor[name])['median']:7.3f} s of the processor, "
            f"{memory[name]['step'] - memory[name]['files']:5d} MB in a step; "
            f"it / vit_flax {ratio(wall[OURS], wall[name])['median']:.2f} and "
            f"{ratio(processor[OURS], processor[name])['median']:.2f}"
        )
    if not arguments.quick:
        result = {
            "question": __doc__.splitlines()[0],
            "model": arguments.model,
            "dtype": arguments.dtype,
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "contenders": {c.name: c.versions for c in contenders},
            "left_out": left_out,
            "largest_difference_of_a_loss": differences,
            "seconds_of_a_step": {name: spread(samples) for name, samples in wall.items()},
            "processor_seconds_of_a_step": {n: spread(s) for n, s in processor.items()},
            "resident_mb": memory,
            "ratios": {
                f"{name} / {OURS}": {
                    "clock": ratio(wall[OURS], wall[name]),
                    "processor": ratio(processor[OURS], processor[name]),
                }
                for name in wall
                if name != OURS
            },
        }
        write_result(f"training-{arguments.model}-{arguments.dtype}", result)


if __name__ == "__main__":
    main()
