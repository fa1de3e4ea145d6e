"""Times of the routed ops against dense attention and against what the device could do at best.

    python -m natsl.kernels.bench                  check, then time; a table, bench.json and bench.png in runs/kernels
    python -m natsl.kernels.bench --quick          the same in seconds
    python -m natsl.kernels.bench --tune           find the best launch parameters of this device and store them
    python -m natsl.kernels.bench --first-call     how long a fresh process waits for its first forward and backward

Correctness comes first: outputs, all gradients and bit-equal repeats at the benchmark's own shape; if one is off, it is
named and nothing is timed. Times are medians of CUDA events with a cold L2 cache (a buffer is overwritten before every
repeat). "forward" records the graph and backward passes run on the calling thread, as in training; "queued" is forward
and backward with all launches waiting, so without the host's share. The floor is that of one ideal kernel per pass
(natsl.kernels.bench.roofline). Exit code: 0; 1 for a red check or a first call over its limit; 2 without CUDA or for a
wrong option.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.kernels.bench.arguments import add_shape, positive, share
from natsl.kernels.shape import ELEMENT_BYTES, Case, Shape

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    import torch

    from natsl.kernels.bench.run import Plan
    from natsl.kernels.bench.verify import Scope

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
FIRST_CALL_LIMIT = 20.0  # seconds
RIVALS = ("sdpa", "flex", "torch")
CHECK_TOKENS = 1000
# What is checked under Triton's interpreter, where nothing is fast.
TINY = Shape(1, 16, 32, 2, 16, "float32")
TINY_TOKENS = 36


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(sorted({share(part) for part in text.split(",")}))


def _rate(text: str) -> float:
    value = share(text)
    if value == 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number in (0, 1]")
    return value


def _rivals(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name != "none")
    for name in names:
        if name not in RIVALS:
            raise argparse.ArgumentTypeError(f"{name!r} is not allowed: {', '.join(RIVALS)} or none")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    called = sys.argv[0] if sys.argv[0].endswith("natsl bench") else "python -m natsl.kernels.bench"
    out = argparse.ArgumentParser(called, description=(__doc__ or "").split("\n\n")[0])
    add = out.add_argument
    add("--quick", action="store_true", help="few lengths, one fraction, dense attention as the only rival")
    add("--tune", action="store_true", help="find and store the best launch parameters of this device for the shape")
    add("--ship", type=Path, metavar="PATH", help="with --tune: also merge them into the table at PATH")
    add("--first-call", action="store_true", help="time a fresh process with an empty kernel cache")
    add("--lengths", type=_lengths, metavar="T,T,…", help="tokens per sequence (4096 to 131072, and 4096 at batch 8)")
    add("--batch", type=positive, metavar="B", help="sequences, for all lengths (1)")
    add("--fractions", type=_fractions, metavar="F,F,…", help="kept fractions (0.1,0.3,0.5)")
    add_shape(out)
    add("--dtype", choices=tuple(ELEMENT_BYTES), default=Shape.dtype, help="(%(default)s)")
    add("--counterfactual", choices=("none", "derivative", "insertion"), default="none",
        help="router gradient of chunks that were left out (%(default)s)")  # fmt: skip
    add("--rate", type=_rate, default=0.1, help="share of them that is sampled (%(default)s)")
    add("--against", type=_rivals, default=None, metavar="NAMES", help=f"rivals: {','.join(RIVALS)} (all) or none")
    add("--out", type=Path, default=Path("runs/kernels"), metavar="FOLDER", help="where results go (%(default)s)")
    add("--first-call-child", choices=("ahead", "serial"), help=argparse.SUPPRESS)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    command = parser()
    args = command.parse_args(argv)
    try:
        shape = Shape(args.heads, args.key_dim, args.value_dim, args.softmax_per_head, args.chunk, args.dtype)
    except ValueError as error:
        command.error(str(error))
    if args.tune and args.first_call:
        command.error("--tune and --first-call are not allowed together: choose one")
    if args.ship is not None and not args.tune:
        command.error("--ship PATH is not allowed without --tune: it writes what tuning finds")
    import torch

    if not torch.cuda.is_available():
        return _without_cuda(args)
    from natsl.kernels.bench.run import bench
    from natsl.kernels.bench.verify import Scope

    try:
        if args.first_call_child:
            _first_call_child(shape, ahead=args.first_call_child == "ahead")
            return 0
        if args.first_call:
            return _first_call(sys.argv[1:] if argv is None else argv)
        device = torch.device("cuda", torch.cuda.current_device())
        if not _check(shape, Scope(CHECK_TOKENS), device):
            return 1
        if args.tune:
            return _tune(shape, device, args.ship)
        bench(_plan(args, shape), device)
    except (OSError, ValueError) as error:  # a folder that cannot be written, a damaged table of launch parameters
        command.error(str(error))
    return 0


def _without_cuda(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("No CUDA device: there is nothing to time (TRITON_INTERPRET=1 only runs the checks)", file=sys.stderr)
        return 2
    if args.tune or args.first_call or args.first_call_child:
        print("No CUDA device: --tune and --first-call need one; the interpreter only runs the checks", file=sys.stderr)
        return 2
    import torch

    from natsl.kernels.bench.verify import Scope

    good = _check(TINY, Scope(TINY_TOKENS, 0.5, ("insertion",)), torch.device("cpu"))
    print("No times: Triton's interpreter is not what runs on a GPU")
    return 0 if good else 1


def _check(shape: Shape, scope: Scope, device: torch.device) -> bool:
    from natsl.kernels.bench import verify

    begin = time.perf_counter()
    findings = list(verify.check(shape, scope, device))
    bad = [item for item in findings if not item.good]
    for item in bad:
        print(f"WRONG {item.op}, {item.setting}: {item.tensor} is off by {item.error:.2e}, allowed {item.bound:.1e}")
    worst = max((item for item in findings if item.bound), key=lambda item: item.error)
    verdict = (
        f"{len(bad)} of {len(findings)} checks failed: nothing is timed" if bad else f"{len(findings)} checks good"
    )
    largest = f"largest error {worst.error:.1e} of {worst.bound:.1e} ({worst.op}, {worst.tensor})"
    seconds = time.perf_counter() - begin
    print(f"{verdict}; {largest}; {shape.dtype}, {scope.tokens} tokens, {seconds:.1f} s", flush=True)
    if not bad:
        print(f"Checked: {', '.join(dict.fromkeys(item.op for item in findings))}", flush=True)
    return not bad


def _cases(args: argparse.Namespace) -> tuple[Case, ...]:
    fractions = args.fractions or ((0.3,) if args.quick else (0.1, 0.3, 0.5))
    rate = 0.0 if args.counterfactual == "none" else args.rate
    if args.lengths or args.batch:
        sizes = [(args.batch or 1, tokens) for tokens in args.lengths or LENGTHS]
    else:
        sizes = [(1, tokens) for tokens in ((4096, 32768) if args.quick else LENGTHS)]
        sizes.append((8, 4096))
    return tuple(Case(batch, tokens, f, rate) for batch, tokens in sizes for f in fractions)


def _plan(args: argparse.Namespace, shape: Shape) -> Plan:
    from natsl.kernels.bench.run import Plan
    from natsl.kernels.registry import Options

    return Plan(
        shape,
        _cases(args),
        Options(shape.chunk_size, args.counterfactual, args.rate, "triton"),
        rivals=args.against if args.against is not None else RIVALS[:1] if args.quick else RIVALS,
        budget_ms=60.0 if args.quick else 150.0,
        out=args.out,
    )


def _tune(shape: Shape, device: torch.device, ship: Path | None) -> int:
    import torch

    from natsl.kernels.bench.tune import Choice, tune
    from natsl.kernels.launch import parameters

    begin = time.perf_counter()

    def report(choice: Choice) -> None:
        gain = f"{100 * (1 - choice.share):.0f}% faster: {choice.best}" if choice.best != choice.default else "default"
        print(f"{choice.kernel:<23} {choice.key:<28} {gain} (default {choice.default})", flush=True)
        for text in choice.skipped:
            print(f"{'':<23} skipped {text[:95]}")

    results = tune(shape, device, report)
    for path in [parameters.stored_path(), *([ship] if ship else [])]:
        parameters.store(path, torch.cuda.get_device_name(device), results)
        print(f"Written: {path}")
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0


def _first_call(argv: Sequence[str]) -> int:
    """Both ways in fresh processes, each with an empty cache of kernels: compiled one by one, and all at once."""
    seconds = {}
    options = [option for option in argv if option != "--first-call"]
    for way in ("serial", "ahead"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "natsl.kernels.bench", *options, "--first-call-child", way]
            begin = time.perf_counter()
            child = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": cache}, check=False)
            seconds[way] = time.perf_counter() - begin
        if child.returncode:
            return child.returncode
    best = seconds["ahead"]
    verdict = "within" if best <= FIRST_CALL_LIMIT else "OVER"
    print(
        f"First forward and backward of all ops after {best:.1f} s with warm_up ({verdict} the limit of "
        f"{FIRST_CALL_LIMIT:.0f} s), {seconds['serial']:.1f} s without"
    )
    return 0 if best <= FIRST_CALL_LIMIT else 1


def _first_call_child(shape: Shape, *, ahead: bool) -> None:
    begin = time.perf_counter()
    import torch

    from natsl.kernels.registry import OPS, Options, layer_inputs
    from natsl.kernels.warmup import warm_up

    device = torch.device("cuda", torch.cuda.current_device())
    inputs = layer_inputs(shape, Case(1, LENGTHS[0], 0.3), device)
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    count = warm_up(shape, device) if ahead else 0
    compiled = time.perf_counter()
    for spec in OPS.values():
        spec.differentiate(inputs, Options(shape.chunk_size, backend="triton"))
    torch.cuda.synchronize()
    end = time.perf_counter()
    print(
        f"{'all at once' if ahead else 'one by one':<12} libraries {loaded - begin:.1f} s, {count} kernels ahead "
        f"{compiled - loaded:.1f} s, first calls {end - compiled:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
