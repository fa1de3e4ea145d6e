"""Record the space of a run's supernet as a table that the benchmark of the samplers searches at no cost.

    natsl bench search record --run runs/search --levels 0,.2,.4,.6,.8,1 --out mine.json

Every policy with one of the levels (values of u, see space/space.py) in each routed layer is scored on the search split
of the run: on the first quarter of its sequences, and on all of them, so that a search that stops poor policies early
can be simulated too. Put the file beside quickstart.json, and it is a problem of that name.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from natsl.errors import UserError
from natsl.files import write_text
from natsl.kernels.bench.arguments import positive, share

LARGEST = 300_000  # bytes of a file
DIGITS = 6
PARTS = (0.25, 1.0)
_ALONE = 12  # policies that are also timed one by one


def _shares(text: str) -> list[float]:
    levels = [share(part) for part in text.split(",")]
    if levels != sorted(set(levels)) or len(levels) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: at least two numbers that increase")
    return levels


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser("natsl bench search record", description=(__doc__ or "").split("\n\n")[0])
    add = out.add_argument
    add("--run", type=Path, required=True, metavar="FOLDER", help="a run with a finished supernet")
    add("--levels", type=_shares, default=[0, 0.2, 0.4, 0.6, 0.8, 1], metavar="NUMBERS",
        help="values of u in each routed layer (0,.2,.4,.6,.8,1)")  # fmt: skip
    add("--parts", type=_shares, default=list(PARTS), metavar="NUMBERS",
        help="shares of the sequences, the last of them 1 (.25,1)")  # fmt: skip
    add("--objectives", default="recall_error,kept_fraction", metavar="NAMES", help="%(default)s")
    add("--context", type=positive, help="tokens at which memory and compute count (those of the run's sequences)")
    add("--batch-size", type=positive, default=32, help="sequences (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (%(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON; it is overwritten")
    return out


def record(args: argparse.Namespace) -> dict[str, Any]:
    """The table: ``u`` has the levels of each routed layer, ``values`` [parts][policies][objectives] in their order."""
    from natsl import checkpoint
    from natsl.data import Split
    from natsl.device import resolve_device
    from natsl.heldout import held_out
    from natsl.load import Choice
    from natsl.progress import Progress
    from natsl.run import Run
    from natsl.search.objective import CostContext, find_objectives, measure
    from natsl.search.rungs import Parts
    from natsl.space.policy import Op
    from natsl.space.space import SearchSpace
    from natsl.tasks import OtherTextConfig

    if args.parts[-1] != 1 or args.parts[0] == 0:
        raise UserError(f"--parts = {args.parts} is not allowed: they go from above 0 to 1")
    if (args.levels[0], args.levels[-1]) != (0, 1):
        raise UserError(f"--levels = {args.levels} is not allowed: they go from 0 to 1")
    device = resolve_device(args.device)
    run = Run.open(args.run.name, args.run.parent, create=False)
    model, made_from = checkpoint.load_model(run.supernet)
    choice = Choice(run=run.name, root=str(args.run.parent))
    data = held_out(choice, OtherTextConfig(), model.config.vocab_size, allow_other=False).data
    names = args.objectives.split(",")
    if len(names) != 2:
        raise UserError(f"--objectives = {args.objectives!r} is not allowed: the benchmark searches two")
    find_objectives(names, set(data.tasks), {})
    routed = [i for i, kind in enumerate(model.kinds) if kind is Op.routed]
    count = len(args.levels) ** len(routed)
    if count * len(args.parts) * len(names) * (DIGITS + 3) > LARGEST:
        raise UserError(f"{count} policies are too many for a file of {LARGEST} bytes: take fewer --levels")
    space, chunk = SearchSpace(), model.config.chunk_size
    policies = [
        space.from_params({f"u.{i}": u for i, u in zip(routed, levels, strict=True)}, model.kinds, chunk)
        for levels in itertools.product(args.levels, repeat=len(routed))
    ]
    costs = CostContext(model.config.layer_shapes(), args.context or data.config.seq_len)
    parts = Parts(model.to(device), data.eval_sets(Split.search), args.parts, args.batch_size)
    values: list[list[list[float]]] = [[] for _ in args.parts]
    seconds, size = 0.0, 4 * args.batch_size  # policies between two signs of progress
    with Progress("record", count, 0) as progress:
        for first in range(0, count, size):
            start = time.perf_counter()
            results = parts.judge_each(policies[first : first + size])
            seconds += time.perf_counter() - start
            for policy, of_policy in zip(policies[first:], results, strict=False):
                for rows, part in zip(values, args.parts, strict=True):
                    if part not in of_policy:
                        raise UserError(f"{policy.describe()} gives results that are not finite")
                    numbers = measure(names, of_policy[part], policy, costs)
                    rows.append([float(f"{numbers[name]:.{DIGITS}g}") for name in names])
            progress.update(len(values[0]), "")
    alone = random.Random(0).sample(policies, min(_ALONE, count))
    start = time.perf_counter()
    for policy in alone:
        parts.judge(policy)
    rate = len(alone) / (time.perf_counter() - start)
    print(f"{count / seconds:.2f} policies a second, {rate:.2f} one by one (of {len(alone)})")
    about = f"step {made_from.get('step')}, {data.config.search_sequences} sequences of {', '.join(data.tasks)}"
    return {
        "about": about,
        "objectives": names,
        "u": [args.levels] * len(routed),
        "parts": args.parts,
        "values": values,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import json

    args = parser().parse_args(argv)
    try:
        table = record(args)
    except ValueError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(table, separators=(",", ":")) + "\n")
    print(f"{len(table['values'][-1])} policies in {args.out}")
    return 0
