"""Measuring how long the layers of a model take on this device, for the tables of ``natsl.space.latency``.

Some layers of one kind are timed together, as a model of their own: between its embedding and its head they find the
caches and the queue of launches in the state in which a whole model would. A decoding step goes on from a cache that is
filled with random numbers, in the middle of a chunk: on CUDA as a graph of ``Decoder``, elsewhere through
``RoutedLM.forward``. A prefill is ``forward`` without a cache, under random routes; on CUDA what the device computes is
timed as a graph, and what the host launches on a text of one chunk, which takes the device less.

Shapes: B sequences, C chunk size, R routing heads, L layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natsl import __version__
from natsl.cache import Cache
from natsl.config import ModelConfig, Precision
from natsl.decode import WARM_UP, Decoder
from natsl.device import device_name
from natsl.errors import UserError
from natsl.files import to_plain, write_json
from natsl.kernels.launch.parameters import stored_path
from natsl.kernels.pages import KeyPages
from natsl.model import RoutedLM
from natsl.progress import Progress
from natsl.space.latency import FRACTIONS, LatencyTable, Step, grid_lengths
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.throughput import median_seconds

LAYERS = 8  # that are timed together at most
MEMORY_SHARE = 0.4  # of the device's, that a cache may take
# All that is timed is gone through several times, and the fastest of its medians counts: other work only adds to it.
ROUNDS = 5
BUDGET_SECONDS, FEWEST, MOST = 0.05, 3, 30  # of one time, itself a median, and calls for it

_log = logging.getLogger(__name__)

Kept = Sequence[Sequence[float]]  # per layer and routing head, the fraction of chunks that softmax keeps


@dataclass(frozen=True)
class Setting:
    """What times depend on besides policy and length: model, precision, device and how many sequences at once."""

    model: ModelConfig
    precision: Precision
    device: torch.device
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the key under which a table is stored."""
        return {
            "device": device_name(self.device),
            "dtype": self.precision.value,
            "batch_size": self.batch_size,
            "natsl": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "model": to_plain(self.model),
        }


def table_path(setting: Setting) -> Path:
    """The user's file of the table of a setting, beside that of tuned launch parameters."""
    name = hashlib.sha256(json.dumps(setting.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
    return stored_path().parent / "latency" / f"{name}.json"


def obtain_table(setting: Setting, wanted: Sequence[int], fresh: bool = False) -> LatencyTable:
    """The table of a setting that covers these lengths in tokens: the stored one, or measured and stored.

    One that is damaged is measured anew, one that does not cover them too, at its own lengths as well, and with
    ``fresh`` any. ``UserError`` if the device has not enough memory, and where ``fresh`` lengths would replace a table
    of longer ones.
    """
    path = table_path(setting)
    table = read_table(path)
    if table is not None and dict(table.made_from) == setting.to_dict():
        longest = table.lengths[-1]
        if fresh and longest > max(wanted):
            raise UserError(
                f"tokens = {max(wanted)} with fresh = true is not allowed: the table in {path} goes up to {longest}, "
                f"which would be lost; give tokens={longest} or more"
            )
        if not fresh and all(map(table.covers, wanted)):
            return table
        wanted = [*wanted, table.lengths[0], longest]
    table = measure_table(setting, wanted)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table.to_dict())
    except OSError as error:  # such as no home folder: it is measured again next time
        _log.warning("the table of times cannot be stored: %s: %s", path, error.strerror or error)
    return table


def read_table(path: Path) -> LatencyTable | None:
    """A stored table; None if there is none, and with a warning if it is damaged."""
    try:
        return LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s is passed over: %s", path, error)
        return None


def planned_seconds(setting: Setting, wanted: Sequence[int]) -> float:
    """About how long ``obtain_table`` takes, 0 if the table is there: long prefills are not counted in."""
    table = read_table(table_path(setting))
    if table is not None and all(map(table.covers, wanted)):
        return 0.0
    cells = len(grid_lengths(wanted, setting.model.chunk_size)) * (len(FRACTIONS) + 2)
    return ROUNDS * cells * len(Step) * 1.5 * BUDGET_SECONDS


def measure_table(setting: Setting, wanted: Sequence[int]) -> LatencyTable:
    """Time every kind of layer that policies of the model can have, at lengths that cover those in ``wanted``."""
    heads, lengths = setting.model.heads, grid_lengths(wanted, setting.model.chunk_size)
    kinds = list(dict.fromkeys(setting.model.layers))
    if Op.routed in kinds and Op.delta not in kinds:
        kinds.append(Op.delta)  # what a layer of op delta is
    columns = {kind: FRACTIONS if kind is Op.routed else (float(kind is Op.softmax),) for kind in kinds}
    count = _layers_at_once(setting, lengths[-1])
    # Of fewer layers than the model has the rest is taken away, from a model of one; else it is left in the layers.
    cases = [_Case(kind, count, fraction) for kind, fractions in columns.items() for fraction in fractions]
    cases += [replace(cases[0], layers=1)] if 1 < count < len(setting.model.layers) else []
    times: dict[tuple[_Case, int, Step], list[float]] = {}
    with Progress("latency", ROUNDS * len(cases) * len(lengths)) as progress, _own_random_state(), _memory(setting):
        benches = {(case.kind, case.layers): Bench(setting, [case.kind] * case.layers) for case in cases}
        for _ in range(ROUNDS):
            for case, tokens in itertools.product(cases, lengths):
                bench, kept = benches[case.kind, case.layers], [[case.fraction] * heads] * case.layers
                for step in Step:
                    # the host launches the same whatever the length
                    length = lengths[0] if step is Step.launch else tokens
                    times.setdefault((case, tokens, step), []).append(bench.milliseconds(step, length, kept))
                progress.update(progress.done + 1, f"{case.kind.value} {case.fraction:g} at {tokens} tokens")
    cells = {cell: min(values) for cell, values in times.items()}
    rest = {step: tuple(_rest(cells, cases, n, step) for n in lengths) for step in Step}
    for step in (Step.decode, Step.launch):  # the same after, and of, any number of tokens
        rest[step] = (statistics.median(rest[step]),) * len(lengths)

    def layer(kind: Op, fraction: float, i: int, step: Step) -> float:
        return max(0.0, cells[_Case(kind, count, fraction), lengths[i], step] - rest[step][i]) / count

    layers = {
        kind: {step: tuple(tuple(layer(kind, f, i, step) for f in fs) for i in range(len(lengths))) for step in Step}
        for kind, fs in columns.items()
    }
    return LatencyTable(setting.to_dict(), lengths, FRACTIONS, rest, layers)


@dataclass(frozen=True)
class _Case:
    """So many layers of a kind, whose heads all keep this fraction."""

    kind: Op
    layers: int
    fraction: float


def _rest(cells: Mapping[tuple[_Case, int, Step], float], cases: Sequence[_Case], tokens: int, step: Step) -> float:
    """Time of a model without its layers: from one of the first case, and from the last, which has one such layer."""
    first, last = cases[0], cases[-1]
    if (last.kind, last.fraction) != (first.kind, first.fraction) or last.layers == first.layers:
        return 0.0
    several, single = cells[first, tokens, step], cells[last, tokens, step]
    return max(0.0, (first.layers * single - several) / (first.layers - 1))


class Bench:
    """A model with these layers and random weights, whose steps are timed."""

    def __init__(self, setting: Setting, kinds: Sequence[Op]) -> None:
        torch.manual_seed(0)
        model = RoutedLM(replace(setting.model, layers=list(kinds)), precision=setting.precision)
        self._model = model.to(setting.device).eval()
        self._device, self._batch, self._vocabulary = setting.device, setting.batch_size, setting.model.vocab_size

    def milliseconds(self, step: Step, tokens: int, kept: Kept) -> float:
        """Median time of a step after, or of, so many tokens of every sequence, of which layers keep ``kept``."""
        if step is Step.decode:
            return 1e3 * self._decode(tokens, kept)
        if step is Step.launch:
            return 1e3 * self._prefill(tokens, kept) if self._device.type == "cuda" else 0.0
        return 1e3 * self._prefill(tokens, kept, by_device=True)

    def call_milliseconds(self, step: Step, tokens: int, kept: Kept) -> float:
        """The same of what a caller waits for: of a prefill with the host's part."""
        return 1e3 * self._prefill(tokens, kept) if step is Step.prefill else self.milliseconds(step, tokens, kept)

    def _decode(self, tokens: int, kept: Kept) -> float:
        model = self._model
        cache = filled_cache(model, self._batch, tokens, kept)
        policy = RoutingPolicy.fill(model.kinds, model.config.chunk_size, LayerPolicy(threshold=math.inf))
        token = torch.randint(self._vocabulary, (self._batch, 1), device=self._device)
        try:
            decoder = Decoder(model, policy, cache, graph=False) if self._device.type == "cuda" else None
        except ValueError:  # the kernels do not take the shape
            decoder = None
        if decoder is None:
            compiled = model.compile_policy(policy, self._batch)
            return self._median(lambda: model(token, compiled, cache=cache))
        with torch.cuda.device(self._device):
            for _ in range(WARM_UP):
                decoder.step(token[:, 0])
            graph = torch.cuda.CUDAGraph()  # nothing is kept by the steps, so that the pages suffice however many run
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                decoder.step(token[:, 0])
            return self._median(graph.replay)

    def _prefill(self, tokens: int, kept: Kept, by_device: bool = False) -> float:
        model = self._model
        routes = random_routes(model, self._batch, tokens, kept)
        policy = RoutingPolicy.fill(model.kinds, model.config.chunk_size, LayerPolicy(threshold=0.0))
        compiled = model.compile_policy(policy, self._batch)
        ids = torch.randint(self._vocabulary, (self._batch, tokens), device=self._device)

        def prefill() -> None:
            with torch.no_grad():
                model(ids, compiled, routes=routes, logits_to_keep=1)

        if not by_device or self._device.type != "cuda":
            return self._median(prefill)
        with torch.cuda.device(self._device):
            for _ in range(WARM_UP):
                prefill()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                prefill()
            return self._median(graph.replay)

    def _median(self, function: Callable[[], object]) -> float:
        """Median seconds of a function after two calls that are not timed."""
        function()
        once = median_seconds(function, 1, self._device)
        return median_seconds(function, max(FEWEST, min(MOST, int(BUDGET_SECONDS / max(once, 1e-9)))), self._device)


def filled_cache(model: RoutedLM, batch: int, tokens: int, kept: Kept) -> Cache:
    """A cache of random numbers as if ``tokens`` of every sequence were read: their complete chunks and half of one.

    Each head keeps this fraction of the complete chunks, in pages in random order; what is rounded goes to the first
    rows and heads.
    """
    cache, C, device = model.new_cache(batch), model.config.chunk_size, model.embed.weight.device
    chunks, start = tokens // C, C // 2
    cache.lengths += chunks * C + start
    for layer, fractions in zip(cache.layers, kept, strict=True):
        layer.tail.normal_()
        if layer.total is not None:
            layer.total.normal_()
        if layer.delta is not None:
            border = torch.randn_like(layer.delta.border)
            decay = -torch.rand_like(layer.delta.decay)
            layer.delta = layer.delta._replace(
                border=border, working=border.clone(), decay=decay, start=torch.full_like(layer.delta.start, start)
            )
        if layer.pages is not None:
            layer.pages = _filled_pages(layer.pages, [_split(f * chunks, batch) for f in fractions], device)
    return cache


def _filled_pages(pages: KeyPages, kept: Sequence[Sequence[int]], device: torch.device) -> KeyPages:
    """Pages with so many kept chunks of each head and row, [R][B], filled with random numbers."""
    counts = torch.tensor(kept, device=device).T.contiguous()  # [B,R]
    used = int(counts.sum()) + counts.numel()
    places = torch.arange(int(counts.max()) + 1, device=device) <= counts[..., None]
    table = places.long().masked_scatter(places, 1 + torch.randperm(used, device=device))
    keys, values = (x.new_empty(1 + used, *x.shape[1:]).normal_() for x in (pages.keys, pages.values))
    return KeyPages(keys, values, table, counts)


def _split(total: float, parts: int) -> list[int]:
    """``parts`` whole numbers, as equal as can be, whose mean is ``total`` but for rounding; larger ones first."""
    whole = round(total * parts)
    return [whole // parts + (i < whole % parts) for i in range(parts)]


def random_routes(model: RoutedLM, batch: int, tokens: int, kept: Kept) -> list[Tensor | None]:
    """Routes [B,N,R] of every layer, of which each head keeps this fraction at random places; None without a router."""
    chunks, device = -(-tokens // model.config.chunk_size), model.embed.weight.device
    routes: list[Tensor | None] = []
    for kind, fractions in zip(model.kinds, kept, strict=True):
        order = torch.rand(batch, chunks, len(fractions), device=device).argsort(1).argsort(1)
        most = torch.tensor([round(f * chunks) for f in fractions], device=device)
        routes.append((order < most).float() if kind is Op.routed else None)
    return routes


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """What is drawn inside leaves the random numbers of the caller as they are."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _memory(setting: Setting) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise UserError(
            f"times at batch size {setting.batch_size} cannot be measured on {device_name(setting.device)}, which has "
            "not enough memory: take a smaller one or shorter texts"
        ) from None


def _layers_at_once(setting: Setting, tokens: int) -> int:
    """How many layers are timed together: those of the model, as far as there is memory for their caches.

    Two at least, if it has as many: the rest could not be told from one by itself.
    """
    c = setting.model
    size = 2 if setting.precision is Precision.bfloat16 else 4
    layer = size * setting.batch_size * tokens * c.heads * (c.key_dim + c.value_dim)
    return min(len(c.layers), max(2, min(LAYERS, int(MEMORY_SHARE * _memory_bytes(setting.device) / layer))))


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Check:
    """A policy's time by the table beside that of a whole model, in milliseconds."""

    policy: str
    step: Step
    tokens: int
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative error of what is predicted."""
        return self.predicted_ms / self.measured_ms - 1


def check_table(table: LatencyTable, setting: Setting, lengths: Sequence[int], policies: int, seed: int) -> list[Check]:
    """Time whole models under random policies, whose heads keep different fractions, beside what the table says.

    Every kind of layer is drawn that a policy may have; layers of op delta are of kind delta, as in an export.
    """
    draw, shapes = random.Random(seed), setting.model.layer_shapes()
    drawn = [_draw_policy(setting.model, draw) for _ in range(policies)]
    cases = list(itertools.product(range(policies), lengths, (Step.decode, Step.prefill)))
    times: dict[tuple[int, int, Step], list[float]] = {case: [] for case in cases}
    with Progress("checks", ROUNDS * len(cases)) as progress, _own_random_state(), _memory(setting):
        benches = [Bench(setting, [layer.op for layer in policy.layers]) for policy, _ in drawn]
        for i, tokens, step in cases * ROUNDS:
            times[i, tokens, step].append(benches[i].call_milliseconds(step, tokens, drawn[i][1]))
            progress.update(progress.done + 1, f"a whole model at {tokens} tokens")
    checks = []
    for i, tokens, step in cases:
        policy, kept = drawn[i]
        means = [statistics.fmean(heads) for heads in kept]
        pairs = zip(policy.layers, means, strict=True)
        text = " ".join("D" if layer.op is Op.delta else f"{mean:.2f}" for layer, mean in pairs)
        predicted = table.milliseconds(step, shapes, policy, means, tokens)
        checks.append(Check(text, step, tokens, predicted, min(times[i, tokens, step])))
    return checks


def _draw_policy(model: ModelConfig, draw: random.Random) -> tuple[RoutingPolicy, list[list[float]]]:
    """A policy and what each head of each layer keeps: small fractions more often, some layers of op delta."""
    layers, kept = [], []
    for kind in model.layers:
        mean = draw.random() ** 2
        heads = [min(1.0, 2 * mean * draw.random()) for _ in range(model.heads)]
        op = Op.delta if kind is Op.routed and draw.random() < 0.25 else kind
        layers.append(LayerPolicy(threshold=0.0) if op is Op.routed else LayerPolicy(op))
        kept.append({Op.delta: [0.0] * model.heads, Op.softmax: [1.0] * model.heads, Op.routed: heads}[op])
    return RoutingPolicy(tuple(layers), model.chunk_size), kept


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("latency")
