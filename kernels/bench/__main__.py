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
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.kernels.bench.report import FLEX, HEADER, SDPA, KernelRow, Row, draw, kernel_table, line
from natsl.kernels.bench.roofline import (
    CHUNK_SIZES,
    ELEMENT_BYTES,
    Case,
    Ceilings,
    Shape,
    for_dtype,
    kernel_work,
    op_work,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from natsl.kernels.registry import Options

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
FIRST_CALL_LIMIT = 20.0  # seconds
RIVALS = ("sdpa", "flex", "torch")
TORCH_LONGEST = 8192
FLEX_LONGEST = 32768  # its block mask grows with the square of the length
CHECK_TOKENS = 1000
# What is checked under Triton's interpreter, where nothing is fast.
TINY = Shape(1, 16, 32, 2, 16, "float32")
TINY_TOKENS = 36

# op → kernel as the profiler calls it → as natsl.kernels.launch.parameters does
KERNELS = {
    "routed_softmax": {
        "forward_kernel": "softmax_forward",
        "dq_kernel": "softmax_dq",
        "dkv_kernel": "softmax_dkv",
        "counterfactual_kernel": "softmax_counterfactual",
        "kept_chunks_kernel": "kept_chunks",
    },
    "routed_delta_rule": {
        "prepare_kernel": "delta_prepare",
        "gaps_kernel": "delta_gaps",
        "scan_kernel": "delta_scan",
        "output_kernel": "delta_output",
        "backward_scan_kernel": "delta_backward_scan",
        "backward_kernel": "delta_backward",
        "backward_finish_kernel": "delta_backward_finish",
    },
    "routed_mix": {"forward_kernel": "mix_forward", "backward_kernel": "mix_backward"},
}


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: an integer ≥ 1")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number in [0, 1]")
    return value


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(sorted({_share(part) for part in text.split(",")}))


def _rate(text: str) -> float:
    value = _share(text)
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
    out = argparse.ArgumentParser("python -m natsl.kernels.bench", description=(__doc__ or "").split("\n\n")[0])
    add = out.add_argument
    add("--quick", action="store_true", help="few lengths, one fraction, dense attention as the only rival")
    add("--tune", action="store_true", help="find and store the best launch parameters of this device for the shape")
    add("--ship", type=Path, metavar="PATH", help="with --tune: also merge them into the table at PATH")
    add("--first-call", action="store_true", help="time a fresh process with an empty kernel cache")
    add("--lengths", type=_lengths, metavar="T,T,…", help="tokens per sequence (4096 to 131072, and 4096 at batch 8)")
    add("--batch", type=_positive, metavar="B", help="sequences, for all lengths (1)")
    add("--fractions", type=_fractions, metavar="F,F,…", help="kept fractions (0.1,0.3,0.5)")
    add("--heads", type=_positive, default=Shape.heads, metavar="R", help="routing heads (%(default)s)")
    add("--key-dim", type=_positive, default=Shape.key_dim, metavar="K", help="key width (%(default)s)")
    add("--value-dim", type=_positive, default=Shape.value_dim, metavar="V", help="value width (%(default)s)")
    add("--softmax-per-head", type=_positive, default=Shape.softmax_per_head, metavar="G",
        help="softmax heads per routing head (%(default)s)")  # fmt: skip
    add("--chunk", type=int, choices=CHUNK_SIZES, default=Shape.chunk_size, help="tokens per chunk (%(default)s)")
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
    try:
        if args.first_call_child:
            _first_call_child(shape, ahead=args.first_call_child == "ahead")
            return 0
        if args.first_call:
            return _first_call(sys.argv[1:] if argv is None else argv)
        device = torch.device("cuda", torch.cuda.current_device())
        if not _check(shape, CHECK_TOKENS, device):
            return 1
        if args.tune:
            return _tune(shape, device, args.ship)
        _bench(args, shape, device)
    except (OSError, ValueError) as error:  # a folder that cannot be written, a damaged table of launch parameters
        command.error(str(error))
    return 0


def _without_cuda(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("No CUDA device: there is nothing to time (TRITON_INTERPRET=1 runs the checks alone)", file=sys.stderr)
        return 2
    if args.tune or args.first_call or args.first_call_child:
        print(
            "No CUDA device: --tune and --first-call need one; the interpreter runs the checks alone", file=sys.stderr
        )
        return 2
    import torch

    good = _check(TINY, TINY_TOKENS, torch.device("cpu"), 0.5, ("insertion",))
    print("No times: Triton's interpreter is not what runs on a GPU")
    return 0 if good else 1


def _check(shape: Shape, tokens: int, device: torch.device, fraction: float = 0.3, modes: Sequence[str] = ()) -> bool:
    from natsl.kernels.bench import verify as conformance

    begin = time.perf_counter()
    findings = list(conformance.check(shape, tokens, device, fraction, modes or conformance.MODES))
    bad = [item for item in findings if not item.good]
    for item in bad:
        print(f"WRONG {item.op}, {item.setting}: {item.tensor} is off by {item.error:.2e}, allowed {item.bound:.1e}")
    worst = max((item for item in findings if item.bound), key=lambda item: item.error)
    verdict = (
        f"{len(bad)} of {len(findings)} checks failed: nothing is timed" if bad else f"{len(findings)} checks good"
    )
    largest = f"largest error {worst.error:.1e} of {worst.bound:.1e} ({worst.op}, {worst.tensor})"
    print(f"{verdict}; {largest}; {shape.dtype}, {tokens} tokens, {time.perf_counter() - begin:.1f} s", flush=True)
    return not bad


def _cases(args: argparse.Namespace) -> list[Case]:
    fractions = args.fractions or ((0.3,) if args.quick else (0.1, 0.3, 0.5))
    if args.lengths or args.batch:
        sizes = [(args.batch or 1, tokens) for tokens in args.lengths or LENGTHS]
    else:
        sizes = [(1, tokens) for tokens in ((4096, 32768) if args.quick else LENGTHS)]
        sizes.append((8, 4096))
    return [Case(batch, tokens, f) for batch, tokens in sizes for f in fractions]


def _bench(args: argparse.Namespace, shape: Shape, device: torch.device) -> None:
    import torch
    import triton

    from natsl.kernels.bench import timing as measure
    from natsl.kernels.registry import Options

    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    limits = for_dtype(measure.ceilings(), shape.dtype)
    options = Options(shape.chunk_size, args.counterfactual, args.rate, "triton")
    cases = _cases(args)
    fractions = sorted({case.fraction for case in cases})
    middle = fractions[len(fractions) // 2]
    rivals = args.against if args.against is not None else RIVALS[:1] if args.quick else RIVALS
    budget = 60.0 if args.quick else 150.0
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}\n{shape}")
    print(f"floor at {limits.flops / 1e12:.0f} TFLOP/s and {limits.bandwidth / 1e12:.2f} TB/s ({limits.source})\n")
    print(HEADER, flush=True)
    rows: list[Row] = []
    kernels: list[KernelRow] = []
    for case in cases:
        for row in _case_rows(shape, case, options, limits, rivals if case.fraction == middle else (), budget, device):
            rows.append(row)
            print(line(row), flush=True)
        if case.fraction == middle:
            kernels += _profile(shape, case, options, limits, device)
    print(kernel_table(kernels))
    result = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m natsl.kernels.bench", *sys.argv[1:]]),
        "shape": asdict(shape),
        "ceilings": asdict(limits),
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": [asdict(row) for row in rows],
        "kernels": [asdict(row) for row in kernels],
    }
    (args.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(args.out / "bench.png", rows, middle, f"{name}, {shape.dtype}, {middle:g} of the chunks kept")
    print(f"\nWritten: {args.out / 'bench.json'}\nWritten: {args.out / 'bench.png'}")


def _case_rows(
    shape: Shape,
    case: Case,
    options: Options,
    limits: Ceilings,
    rivals: Sequence[str],
    budget: float,
    device: torch.device,
) -> Iterator[Row]:
    import torch

    from natsl.kernels.bench import rivals as others
    from natsl.kernels.registry import OPS, backward, forward, layer_inputs, output_gradients

    tensors = layer_inputs(shape, case.batch, case.tokens, case.fraction, device)

    def ours(name: str, op: str, options: Options) -> Row:
        with torch.no_grad():
            given = output_gradients(forward(op, tensors, options))
        inputs = [tensors[name] for name in OPS[op][0]]
        return _measure(
            Row(name, case.batch, case.tokens, case.fraction),
            lambda: forward(op, tensors, options),
            lambda outputs: backward(op, tensors, outputs, given),
            inputs,
            _floors(op, shape, case, limits),
            budget,
        )

    for op in ("routed_softmax", "routed_delta_rule", "branches", "routed_mix", "layer"):
        yield ours(op, op, options)
    if options.counterfactual == "none":
        rate = 0.1
        yield ours(f"layer, insertion {rate:g}", "layer", replace(options, counterfactual="insertion", rate=rate))
    if "torch" in rivals and case.tokens <= TORCH_LONGEST and case.batch == 1:
        yield ours("layer, torch backend", "layer", replace(options, backend="torch"))
    dense = Case(case.batch, case.tokens, 1.0)
    for name in ("sdpa", "flex"):
        if name not in rivals or (name == "flex" and case.tokens > FLEX_LONGEST):
            continue
        seen = dense if name == "sdpa" else case
        row = Row(SDPA if name == "sdpa" else FLEX, case.batch, case.tokens, None if name == "sdpa" else case.fraction)
        try:
            attend, inputs = others.prepare(name, tensors, shape.chunk_size)
            (given,) = output_gradients((attend().detach(),))
            yield _measure(
                row,
                attend,
                lambda o, given=given, inputs=inputs: torch.autograd.grad(o, inputs, given),  # type: ignore[misc]
                inputs,
                _floors("routed_softmax", shape, seen, limits),
                budget,
            )
        except Exception as error:  # another library's limits: the row says so and the others go on
            yield replace(row, note=f"skipped: {(str(error).splitlines() or [type(error).__name__])[0][:70]}")


def _floors(op: str, shape: Shape, case: Case, limits: Ceilings) -> tuple[float, float]:
    work, work_backward = op_work(op, shape, case)
    return limits.floor_ms(work), limits.floor_ms(work) + limits.floor_ms(work_backward)


def _measure(
    row: Row,
    run: Callable[[], Any],
    differentiate: Callable[[Any], object],
    inputs: Sequence[Tensor],
    floors: tuple[float, float],
    budget: float,
) -> Row:
    import torch

    from natsl.kernels.bench.timing import peak_gib, time_ms

    def both() -> object:
        return differentiate(run())

    try:
        both()
        return replace(
            row,
            peak_gib=peak_gib(both, inputs),
            forward_ms=time_ms(run, budget_ms=budget),
            both_ms=time_ms(both, budget_ms=budget),
            queued_ms=time_ms(both, queued=True, budget_ms=budget),
            floor_forward_ms=floors[0],
            floor_both_ms=floors[1],
        )
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return replace(row, note="skipped: out of memory")


def _profile(shape: Shape, case: Case, options: Options, limits: Ceilings, device: torch.device) -> list[KernelRow]:
    from natsl.kernels.bench.timing import kernel_times
    from natsl.kernels.registry import differentiate, layer_inputs

    tensors = layer_inputs(shape, case.batch, case.tokens, case.fraction, device)
    work = kernel_work(shape, case, options.counterfactual, options.rate)
    rows = []
    for op, names in KERNELS.items():
        other, launches = 0.0, 0
        for name, (ms, count) in kernel_times(lambda op=op: differentiate(op, tensors, options)).items():  # type: ignore[misc]
            kernel = names.get(name)
            if kernel is None:
                other, launches = other + ms, launches + count
                continue
            floor = limits.floor_ms(work[kernel]) if kernel in work else None
            rows.append(KernelRow(kernel, case.batch, case.tokens, case.fraction, ms, count, floor))
        rows.append(KernelRow(f"torch, in {op}", case.batch, case.tokens, case.fraction, other, launches, None))
    return rows


def _tune(shape: Shape, device: torch.device, ship: Path | None) -> int:
    import torch

    from natsl.kernels.bench.tune import Choice, tune
    from natsl.kernels.launch import parameters as tuning

    begin = time.perf_counter()

    def report(choice: Choice) -> None:
        gain = f"{100 * (1 - choice.share):.0f}% faster: {choice.best}" if choice.best != choice.default else "default"
        print(f"{choice.kernel:<23} {choice.key:<28} {gain} (default {choice.default})", flush=True)
        for text in choice.skipped:
            print(f"{'':<23} skipped {text[:95]}")

    found = tune(shape, device, report)
    for path in [tuning.stored_path(), *([ship] if ship else [])]:
        tuning.store(path, torch.cuda.get_device_name(device), found)
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
        f" {FIRST_CALL_LIMIT:.0f} s), {seconds['serial']:.1f} s without"
    )
    return 0 if best <= FIRST_CALL_LIMIT else 1


def _first_call_child(shape: Shape, *, ahead: bool) -> None:
    begin = time.perf_counter()
    import torch

    from natsl.kernels.launch import parameters as tuning
    from natsl.kernels.registry import OPS, Options, differentiate, layer_inputs

    device = torch.device("cuda", torch.cuda.current_device())
    inputs = layer_inputs(shape, 1, LENGTHS[0], 0.3, device)
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    count = tuning.warm_up(shape, device) if ahead else 0
    compiled = time.perf_counter()
    for op in OPS:
        differentiate(op, inputs, Options(shape.chunk_size, backend="triton"))
    torch.cuda.synchronize()
    end = time.perf_counter()
    print(
        f"{'all at once' if ahead else 'one by one':<12} libraries {loaded - begin:.1f} s, {count} kernels ahead "
        f"{compiled - loaded:.1f} s, first calls {end - compiled:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
