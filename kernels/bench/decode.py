"""Times of ``decode_step``, one layer's mixing of a new token, against dense attention and the bytes it has to move.

    python -m natsl.kernels.bench.decode           a table, and decode.json in runs/kernels

Times are of CUDA graphs that go through so many caches in turn that no cache is in L2 when it is read again, as in a
model of many layers: medians of several replays, in microseconds per step. *dense*: attention alone over as many
tokens, every key kept, by cuDNN. The floor is the bytes of the kept keys and values, and of the states, read and
written, over the bandwidth of the device. Exit code: 0; 2 without CUDA or for a wrong option.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.kernels.bench.arguments import add_shape, positive, share
from natsl.kernels.shape import Shape

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    import torch
    from torch import Tensor

    from natsl.kernels.decode import DecodeState

CASES = ((1, 4096), (1, 32768), (1, 131072), (16, 32768))  # batch, tokens
ROTATED_BYTES = 400 << 20  # of the caches together: several times the L2 cache
WIDTH, TAPS = 1024, 4  # of the layer's input and of its convolution


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser("python -m natsl.kernels.bench.decode", description=(__doc__ or "").split("\n\n")[0])
    add = out.add_argument
    add("--case", type=_case, action="append", metavar="B×T", help="sequences and tokens, such as 16x32768; repeatable")
    add("--fraction", type=share, default=0.3, metavar="F", help="kept fraction (%(default)s)")
    add_shape(out)
    add("--out", type=Path, default=Path("runs/kernels"), metavar="FOLDER", help="where decode.json goes (%(default)s)")
    return out


def _case(text: str) -> tuple[int, int]:
    batch, _, tokens = text.replace("×", "x").partition("x")
    return positive(batch), positive(tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    command = parser()
    args = command.parse_args(argv)
    try:
        shape = Shape(args.heads, args.key_dim, args.value_dim, args.softmax_per_head, args.chunk)
    except ValueError as error:
        command.error(str(error))
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device: there is nothing to time", file=sys.stderr)
        return 2
    from natsl.kernels.bench.timing import ceilings

    found = ceilings()
    rows = []
    print(f"{'batch × tokens':<16} {'step µs':>8} {'dense µs':>9} {'floor µs':>9}  kernels µs")
    for batch, tokens in args.case or CASES:
        row = time_case(shape, batch, tokens, args.fraction, found.bandwidth)
        rows.append(row)
        kernels = ", ".join(f"{name} {us:.1f}" for name, us in row["kernels_us"].items())
        sizes = f"{batch} × {tokens}"
        print(
            f"{sizes:<16} {row['step_us']:>8.1f} {row['dense_us']:>9.1f} {row['floor_us']:>9.1f}  {kernels}", flush=True
        )
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": found.source,
        "rows": rows,
    }
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        command.error(f"--out {args.out}: {error.strerror}")
    return 0


def time_case(shape: Shape, batch: int, tokens: int, fraction: float, bandwidth: float) -> dict[str, Any]:
    """Microseconds of a step in the middle of a chunk after ``tokens``, of dense attention and at best."""
    from natsl.kernels.bench.timing import kernel_times

    device = "cuda"
    dense_bytes = batch * tokens * shape.softmax_heads * (shape.softmax_key_dim + shape.softmax_value_dim) * 2
    dense = _dense_us(shape, batch, tokens, max(4, int(ROTATED_BYTES / dense_bytes) + 1))
    seeds = range(max(4, int(ROTATED_BYTES / max(1, fraction * dense_bytes)) + 1))
    states = [layer_state(shape, batch, tokens, fraction, seed, device) for seed in seeds]
    run = step_of(shape, batch, device)

    def steps() -> None:
        for state in states:
            run(state)

    times = kernel_times(steps)
    return {
        "batch": batch,
        "tokens": tokens,
        "fraction": fraction,
        "caches": len(states),
        "step_us": _graph_us(steps) / len(states),
        "kernels_us": {
            name.removeprefix("decode_").removesuffix("_kernel"): 1e3 * ms / len(states)
            for name, (ms, _) in times.items()
            if name.startswith("decode_")
        },
        "dense_us": dense,
        "floor_us": 1e6 * sum(least_bytes(shape, state) for state in states) / len(states) / bandwidth,
    }


def step_of(shape: Shape, batch: int, device: str) -> Callable[[DecodeState], Tensor]:
    """A step with random weights and inputs, as a function of the state."""
    import torch

    from natsl.kernels.decode import DecodePolicy, DecodeWeights, decode_step

    R, K, V, Hs = shape.heads, shape.key_dim, shape.value_dim, shape.softmax_heads
    random = _random(0, device)

    def full(value: float, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(size, value, dtype=dtype, device=device)

    return partial(
        decode_step,
        random(batch, WIDTH).bfloat16(),
        random(batch, R * (2 * K + 2 * V + 2)).bfloat16(),
        DecodeWeights(
            conv=random(R * (2 * K + V), TAPS) * 0.5,
            query_norm=full(1.0, shape.softmax_key_dim),
            key_norm=full(1.0, shape.softmax_key_dim),
            rotation=None,
            rate=random(R).abs(),
            gate_bias=random(2, R),
            mix=(random(2 * Hs, R * K) * 0.05).bfloat16(),
            mix_bias=random(2 * Hs),
            count_bias=random(2 * Hs),
            router=random(R, WIDTH) * 0.02,
            router_bias=random(R),
            delta_norm=full(1.0, shape.softmax_value_dim),
            softmax_norm=full(1.0, shape.softmax_value_dim),
        ),
        policy=DecodePolicy(
            threshold=full(0.0, batch, R),
            cap=full(1.0, batch, dtype=torch.float64),
            burst=full(0, batch, dtype=torch.int64),
            temperature=full(1.0, batch),
            delta_only=full(False, batch, dtype=torch.bool),
        ),
        heads=R,
        softmax_per_head=shape.softmax_per_head,
        chunk_size=shape.chunk_size,
        eps=1e-6,
    )


def layer_state(shape: Shape, batch: int, tokens: int, fraction: float, seed: int, device: str) -> DecodeState:
    """A state after ``tokens`` and in the middle of a chunk: each head keeps about this fraction, at random pages."""
    import torch

    from natsl.kernels.decode import DecodeState
    from natsl.kernels.delta import DeltaState
    from natsl.kernels.pages import KeyPages

    R, K, V, C, G = shape.heads, shape.key_dim, shape.value_dim, shape.chunk_size, shape.softmax_per_head
    random, chunks = _random(seed, device), tokens // C
    kept = (chunks * fraction * (1 + 0.1 * random(batch, R))).round().long().clamp(0, chunks)
    used = int(kept.sum()) + batch * R
    places = torch.arange(int(kept.max()) + 2, device=device) <= kept[..., None]
    table = places.long().masked_scatter(places, 1 + torch.randperm(used, device=device))
    pages = KeyPages(
        random(1 + used, G, C, shape.softmax_key_dim).bfloat16(),
        random(1 + used, G, C, shape.softmax_value_dim).bfloat16(),
        table,
        kept,
    )
    border, start = random(batch, R, K, V), torch.full((batch,), C // 2, device=device)
    return DecodeState(
        tail=random(batch, TAPS - 1, R * (2 * K + V)).bfloat16(),
        total=random(batch, WIDTH),
        delta=DeltaState(border, border.clone(), -random(batch, R).abs(), start),
        pages=pages,
        read=start + tokens // C * C,
        live=torch.ones(batch, dtype=torch.bool, device=device),
    )


def _random(seed: int, device: str) -> Callable[..., Tensor]:
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return lambda *size: torch.randn(size, device=device, generator=generator)


def least_bytes(shape: Shape, state: DecodeState) -> int:
    """Bytes that a step has to move: kept keys and values, those of the open chunk, and the states twice."""
    assert state.pages is not None
    assert state.delta is not None
    tokens = int(state.pages.kept.sum()) * shape.chunk_size + state.pages.kept.numel() * (shape.chunk_size // 2)
    width = shape.softmax_per_head * (shape.softmax_key_dim + shape.softmax_value_dim)
    return tokens * width * 2 + 2 * state.delta.working.numel() * 4


def _dense_us(shape: Shape, batch: int, tokens: int, count: int) -> float:
    """Microseconds of attention alone over dense keys and values, by cuDNN, ``count`` caches in turn."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    Hs = shape.softmax_heads
    q = torch.randn(batch, Hs, 1, shape.softmax_key_dim, device="cuda", dtype=torch.bfloat16)
    caches = [
        [
            torch.randn(batch, Hs, tokens, width, device="cuda", dtype=torch.bfloat16)
            for width in (shape.softmax_key_dim, shape.softmax_value_dim)
        ]
        for _ in range(count)
    ]

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for k, v in caches:
                F.scaled_dot_product_attention(q, k, v)

    return _graph_us(attend) / count


def _graph_us(function: Callable[[], None], replays: int = 5, repeats: int = 7) -> float:
    """Median microseconds of ``function``, recorded as a CUDA graph."""
    import torch

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / replays)
    middle: float = statistics.median(times)
    return middle


if __name__ == "__main__":
    raise SystemExit(main())
