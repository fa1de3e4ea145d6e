"""Hypervolume of the samplers against the number of evaluations, mean and spread over seeds. CPU only, minutes.

    natsl bench search                                  all samplers on all problems
    natsl bench search --problems quickstart --seeds 20

Problems: the recorded policies of the quickstart's supernet, a made-up one of 12 layers, HPOLib, NAS-Bench-201 and
C2-DTLZ2; the last three need the extra ``bench``. Writes search.json, search.md and search.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from natsl.kernels.bench.arguments import positive, share
from natsl.search.samplers import DEAR, Sampler

PROBLEMS = ("quickstart", "layers", "hpolib", "nasbench201", "dtlz")


def _names(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not allowed: {', '.join(known)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    called = sys.argv[0] if sys.argv[0].endswith("bench search") else "python -m natsl.search.bench"
    out = argparse.ArgumentParser(called, description=(__doc__ or "").split("\n\n")[0])
    samplers = [sampler.value for sampler in Sampler]
    add = out.add_argument
    add("--problems", type=lambda text: _names(text, PROBLEMS), default=list(PROBLEMS), metavar="NAMES",
        help=f"{','.join(PROBLEMS)} (all)")  # fmt: skip
    add("--samplers", type=lambda text: _names(text, samplers), default=samplers, metavar="NAMES",
        help=f"{','.join(samplers)} (all)")  # fmt: skip
    add("--trials", type=positive, default=140, help="evaluations of a search (%(default)s)")
    add("--dear-trials", type=positive, default=60, help="of a sampler whose proposals are dear: gp (%(default)s)")
    add("--seeds", type=positive, default=10, help="searches for each sampler (%(default)s)")
    add("--local-share", type=share, default=0.0, help="share of moves near the knee (%(default)s)")
    add("--out", type=Path, default=Path("runs/bench-search"), metavar="FOLDER", help="for results (%(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    import optuna

    from natsl.search.bench.problems import PROBLEMS as MAKE
    from natsl.search.bench.report import summary, table, write
    from natsl.search.bench.run import curves

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results = []
    for problem in [MAKE[name]() for name in args.problems]:
        for sampler in map(Sampler, args.samplers):
            trials = min(args.trials, args.dear_trials) if sampler in DEAR else args.trials
            results.append(summary(curves(problem, sampler, trials, args.seeds, args.local_share)))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    write(results, args.out)
    print(f"results in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
