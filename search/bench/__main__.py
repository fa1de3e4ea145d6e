"""Hypervolume of the samplers against the number of evaluations, mean and spread over seeds. CPU only, minutes.

    natsl bench search                                  all samplers on all problems
    natsl bench search --samplers sweep                 one of them again; the others' results stay
    natsl bench search record --help                    record the space of a supernet of yours
    natsl bench search --proposals 10000                only time proposals, with so many trials in the study

Problems: recorded policies of supernets (quickstart, small), a made-up one of 12 layers, HPOLib, NAS-Bench-201 and
C2-DTLZ2; the last three need the extra ``bench``. The reference is what the others are to reach: how good it is in the
end, and after how many evaluations each of them is as good. Writes search.json, search.md and search.png after each
sampler and problem.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from natsl.kernels.bench.arguments import positive, share
from natsl.search.samplers import DEAR, Sampler

PROBLEMS = ("quickstart", "small", "layers", "hpolib", "nasbench201", "dtlz")
_SMALL = Path(__file__).with_name("small.json")  # it is not always there


def _names(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not allowed: {', '.join(known)}")
    return names


def _reference(text: str) -> tuple[str, int]:
    name, _, trials = text.partition(":")
    return _names(name, [sampler.value for sampler in Sampler])[0], positive(trials)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    called = sys.argv[0] if sys.argv[0].endswith("bench search") else "python -m natsl.search.bench"
    more = "natsl bench search record --help: record the space of a supernet of yours"
    out = argparse.ArgumentParser(called, description=(__doc__ or "").split("\n\n")[0], epilog=more)
    samplers = [sampler.value for sampler in Sampler]
    problems = [name for name in PROBLEMS if name != "small" or _SMALL.exists()]
    add = out.add_argument
    add("--problems", type=lambda text: _names(text, problems), default=problems, metavar="NAMES",
        help=f"{','.join(problems)} (all)")  # fmt: skip
    add("--samplers", type=lambda text: _names(text, samplers), default=samplers, metavar="NAMES",
        help=f"{','.join(samplers)} (all)")  # fmt: skip
    add("--trials", type=positive, default=140,
        help="evaluations of a search, a quarter of them anchors where the space has some (%(default)s)")  # fmt: skip
    add("--dear-trials", type=positive, default=60, help="of a sampler whose proposals are dear: gp (%(default)s)")
    add("--reference", type=_reference, default=("tpe", 500), metavar="SAMPLER:TRIALS",
        help="what is to be reached (tpe:500)")  # fmt: skip
    add("--seeds", type=positive, default=10, help="searches for each sampler (%(default)s)")
    add("--local-share", type=share, default=0.0, help="share of moves near the knee (%(default)s)")
    add("--parts", action="store_true", help="judge policies on a part of the data first, where a problem has parts")
    add("--proposals", type=positive, metavar="TRIALS", help="time proposals in a study of so many trials instead")
    add("--out", type=Path, default=Path("runs/bench-search"), metavar="FOLDER", help="for results (%(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["record"]:
        from natsl.search.bench.record import main as record

        return record(arguments[1:])
    args = parser().parse_args(arguments)
    import optuna

    from natsl.search.bench.problems import PROBLEMS as MAKE
    from natsl.search.bench.report import Results
    from natsl.search.bench.run import Setting, curves, proposal_times

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = list(map(Sampler, args.samplers))
    if args.proposals is not None:
        for sampler in samplers:
            wall, busy = proposal_times(sampler, args.proposals, args.local_share)
            text = f"{1000 * wall:.1f} ms, {1000 * busy:.1f} ms of CPU time"
            print(f"{sampler.value}: {text} a proposal, {args.proposals} trials of 12 numbers", flush=True)
        return 0
    setting = Setting(args.seeds, args.trials // 4, args.local_share, args.parts)
    results = Results(args.out, setting, args.reference)
    for problem in [MAKE[name]() for name in args.problems]:
        for sampler in samplers:
            trials = min(args.trials, args.dear_trials) if sampler in DEAR else args.trials
            if sampler.value == args.reference[0]:
                trials = max(trials, args.reference[1])
            print(results.add(curves(problem, sampler, trials, setting)), flush=True)
    print(f"{results.passed()}results in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
