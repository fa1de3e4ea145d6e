"""How much choosing chunks could gain in a trained supernet, and how much of that is known when a chunk is routed.

The gain of a chunk is what keeping it, instead of writing it to the state, takes off the loss of its sequence: exact to
first order, chunks left out by the effect of inserting them (docs/method.md). Predictors of gains are fitted on text of
the training part with the supernet frozen, from what a layer knows at the end of the chunk. They bound from below what
a router with such inputs could get from this supernet; one that is trained along with it changes the supernet as well.

Shapes: B sequences, T tokens, C chunk size, N = T / C chunks, D width, R routing heads, F features, M = B·N chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natsl.evaluate import Routing, count
from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.routing import chunk_means
from natsl.layout import Layout
from natsl.mixer import RoutedMixer
from natsl.model import RoutedLM
from natsl.modules import short_convolution
from natsl.search.controls.comparison import floor_of, selection_share
from natsl.search.controls.hindsight import gains_of, hindsight, take
from natsl.search.controls.learned import Learned, Subject, follow, in_batches
from natsl.search.controls.routes import shuffled
from natsl.space.policy import RoutingPolicy
from natsl.tasks.sequences import Batch

HIDDEN, CONV, SIGNALS, ALL = "hidden", "conv", "signals", "all"  # features of a chunk
FLOOR = 0.125  # share of the sequence left after a chunk, below which its gain is not scaled up further
RIDGE = 3e-3  # of the standardised features' variance
STEPS, ROWS, HIDDEN_UNITS = 1500, 4096, 64  # training of a small network
ROUNDS = 3  # after each, predictions follow from what the routes of the one before have brought about

Features: TypeAlias = dict[str, Tensor]  # name → float32 [B,N,F], on the CPU
Predictor: TypeAlias = Callable[[Tensor], Tensor]  # standardised features [B,N,F] → rates of gains [B,N,R]


def features_of(mixer: RoutedMixer, x: Tensor, route: Tensor) -> Features:
    """What a layer knows of its chunks when it routes them: its normed input x [B,T,D], routes [B,N,R] so far.

    ``hidden`` [B,N,D] and ``conv`` [B,N,channels]: means of the input, and of queries, keys and values after the
    convolution. ``signals`` [B,N,7·R] per head: decay and write strength; mean and largest relative error of what the
    state returns for a key before its value is written; magnitude of values; the largest share of attention that a key
    gets inside its own chunk; cosine between the chunk's mean key and the nearest one of the chunks kept before.
    ``all``: the three together.
    """
    c = mixer.config
    C, R = c.chunk_size, c.heads
    x = x.float()
    qkv = short_convolution(mixer.qkv_proj(x), mixer.conv)
    parts = mixer.split(qkv)
    _, k, v = mixer.delta_heads(*parts)
    g, beta = mixer.gates(x)
    ahead = F.pad(k[:, 1:], (0, 0, 0, 0, 0, 1)).contiguous()  # asks for a key's value one token before it is written
    state, _ = routed_delta_rule(ahead, k.contiguous(), v.contiguous(), g, beta, route, chunk_size=C)
    returned = F.pad(state[:, :-1], (0, 0, 0, 0, 1, 0)).float() * c.key_dim**0.5 * g.exp()[..., None]
    size = v.float().square().sum(-1)
    error = ((v.float() - returned).square().sum(-1) / (size + 1e-6)).unflatten(1, (-1, C))  # [B,N,C,R]
    error = error[:, :, 1:]  # a chunk begins with the state at its border, which nothing was asked of

    qs, ks, _ = mixer.softmax_heads(*parts, Layout())
    scores = torch.einsum("bnqhk,bnshk->bnhqs", *(y.unflatten(1, (-1, C)) for y in (qs, ks))) * ks.shape[-1] ** -0.5
    future = torch.ones(C, C, dtype=torch.bool, device=x.device).triu(1)
    shares = scores.masked_fill(future, -torch.inf).softmax(-1).mean(-2)  # [B,N,Hs,C]: what each key gets
    keys = F.normalize(chunk_means(k.flatten(2).float(), C).unflatten(2, (R, -1)), dim=-1)
    near = torch.einsum("bnrk,bmrk->bnmr", keys, keys)
    earlier = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=x.device).tril(-1)
    seen = earlier[None, :, :, None] & (route[:, None] > 0.5)
    signals = (
        *(chunk_means(y.float(), C) for y in (g, beta)),
        error.mean(2),
        error.amax(2),
        chunk_means(size.sqrt(), C),
        shares.amax(-1).unflatten(2, (R, -1)).mean(-1),
        near.masked_fill(~seen, -1.0).amax(2),
    )
    features = {HIDDEN: chunk_means(x, C), CONV: chunk_means(qkv, C), SIGNALS: torch.cat(signals, -1)}
    features[ALL] = torch.cat([*features.values()], -1)
    return {name: value.float().cpu() for name, value in features.items()}


def observe(
    model: RoutedLM, policy: RoutingPolicy, batch: Batch, size: int, routes: Sequence[Tensor | None]
) -> dict[int, Features]:
    """Features of all chunks under routes [B,N,R], by routed layer; ``size`` sequences at a time.

    The length must be a multiple of the chunk size.
    """
    mixers: dict[int, RoutedMixer] = {
        i: model.get_submodule(f"blocks.{i}.mixer")  # type: ignore[misc]
        for i, route in enumerate(routes)
        if route is not None
    }
    inputs: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0]

    parts: dict[int, list[Features]] = {i: [] for i in mixers}
    hooks = [mixer.register_forward_pre_hook(hook) for mixer in mixers.values()]
    model.eval()
    try:
        with torch.no_grad():
            for part, own in in_batches(model, batch, size, routes):
                output = model(part.tokens, policy, routes=own, logits_to_keep=0)
                for i, mixer in mixers.items():
                    parts[i].append(features_of(mixer, inputs[mixer], output.layers[i].route))
    finally:
        for handle in hooks:
            handle.remove()
    return {i: {name: torch.cat([part[name] for part in own]) for name in own[0]} for i, own in parts.items()}


def measure_gains(
    model: RoutedLM, policy: RoutingPolicy, batch: Batch, size: int, routes: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """Gains of all chunks, as ``observe``: float32 [B,N,R] on the CPU, nats of the whole sequence."""
    model.eval()
    parts = [gains_of(model, policy, part, own) for part, own in in_batches(model, batch, size, routes)]
    return {
        i: torch.cat([gain.cpu() for gain in layer if gain is not None])
        for i, layer in enumerate(zip(*parts, strict=True))
        if routes[i] is not None
    }


def rates_of(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Gains [B,N,R] per share of the sequence that is left after the chunk [M,R], and that share as a weight [M,1].

    Early chunks have more queries to come: a router does not know how many.
    """
    N = gains.shape[1]
    left = ((N - 1 - torch.arange(N)) / N)[None, :, None]
    weight = left.expand(len(gains), -1, 1)
    return (gains / left.clamp(min=FLOOR)).flatten(0, 1), weight.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and deviation of a layer's features, name → [F], which it standardises others by."""

    mean: Features
    deviation: Features

    @classmethod
    def of(cls, features: Features) -> Scale:
        """The scale that gives these features mean 0 and variance 1."""
        rows = {name: x.flatten(0, 1) for name, x in features.items()}
        return cls({name: x.mean(0) for name, x in rows.items()}, {name: x.std(0) + 1e-6 for name, x in rows.items()})

    def __call__(self, features: Features) -> Features:
        return {name: (x - self.mean[name]) / self.deviation[name] for name, x in features.items()}


@dataclass(frozen=True, eq=False)
class Fitted:
    """A predictor of one layer's gains, the name of the features that it reads, and ``has_unit`` of its kind."""

    reads: str
    predict: Predictor
    has_unit: bool

    def __call__(self, features: Features) -> Tensor:
        """Predicted gains per share of the sequence that is left, or scores: float32 [B,N,R] on the CPU."""
        return self.predict(features[self.reads]).cpu()


def fit_ridge(x: Tensor, gains: Tensor, device: torch.device) -> Predictor:
    """Ridge regression of rates on features, weighted by what is left of the sequence."""

    def with_one(x: Tensor) -> Tensor:
        return F.pad(x.to(device), (0, 1), value=1.0)

    x = with_one(x.flatten(0, 1)).double()
    y, w = (part.to(device, torch.float64) for part in _clipped(gains))
    gram = x.T @ (w * x)
    gram.diagonal().add_(RIDGE * float(w.sum()))
    solution = torch.linalg.solve(gram, x.T @ (w * y)).float()
    return lambda x: with_one(x) @ solution


def fit_ranking(x: Tensor, gains: Tensor, device: torch.device) -> Predictor:
    """A linear score fitted to order pairs of chunks by their rates, each pair weighted by the difference."""
    return _train(x, gains, device, nn.Linear, _pair_loss)


def fit_network(x: Tensor, gains: Tensor, device: torch.device) -> Predictor:
    """Regression of rates by a network with one hidden layer."""

    def build(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, HIDDEN_UNITS), nn.SiLU(), nn.Dropout(0.2), nn.Linear(HIDDEN_UNITS, outputs)
        )

    return _train(x, gains, device, build, lambda z, y, w: (w * (z - y).square()).mean())


class Kind(NamedTuple):
    """A kind of predictor, one for each of the features it ``reads``; ``has_unit``: it says rates, not only order."""

    name: str
    fit: Callable[[Tensor, Tensor, torch.device], Predictor]
    reads: tuple[str, ...]
    has_unit: bool = True


KINDS = (
    Kind("ridge", fit_ridge, (HIDDEN, CONV, SIGNALS, ALL)),
    Kind("ranking", fit_ranking, (ALL,), has_unit=False),
    Kind("network", fit_network, (SIGNALS, ALL)),
)


def _pair_loss(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    score, rate, weight = z - z.roll(1, 0), y - y.roll(1, 0), torch.minimum(w, w.roll(1, 0))
    return (weight * rate.abs() * F.softplus(-score * rate.sign())).mean()


def _train(
    x: Tensor,
    gains: Tensor,
    device: torch.device,
    build: Callable[[int, int], nn.Module],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Predictor:
    """A network from features x [B,N,F] to rates of gains [B,N,R]; ``loss`` has these in units of their deviation."""
    x, y, w = (part.to(device) for part in (x.flatten(0, 1), *_clipped(gains)))
    unit = y.std(0) + 1e-9
    y = y / unit
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        net = build(x.shape[1], y.shape[1]).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (min(ROWS, len(x)),), device=device)
            optimizer.zero_grad()
            loss(net(x[rows]), y[rows], w[rows]).backward()
            optimizer.step()
    net.eval()

    def predict(features: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = net(features.to(device)) * unit
        return z

    return predict


def _clipped(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Rates and weights, without the tails: a rate is at most ten times its head's mean magnitude."""
    rate, weight = rates_of(gains)
    bound = 10 * rate.abs().mean(0)
    return rate.clamp(-bound, bound), weight


def accuracy(predicted: Tensor, gains: Tensor, has_unit: bool) -> dict[str, list[float]]:
    """How well predictions [B,N,R] of gains [B,N,R] do, by head.

    ``r2`` of the clipped rates, of predictions in their unit only; ``captured``: what the tenth of the chunks with the
    highest predictions gains, 0 being a random tenth and 1 that with the highest rates. 0 where all gain the same.
    """
    y, w = _clipped(gains)
    z = predicted.flatten(0, 1)
    mean = (w * y).sum(0) / w.sum()
    spread = (w * (y - mean).square()).sum(0)
    r2 = {"r2": torch.where(spread > 0, 1 - (w * (y - z).square()).sum(0) / spread, 0.0).tolist()}
    gain = gains.flatten(0, 1)
    tenth = max(1, len(gain) // 10)
    rate, _ = rates_of(gains)
    best, got = (gain.gather(0, x.argsort(0, descending=True)[:tenth]).mean(0) for x in (rate, z))
    room = best - gain.mean(0)
    captured = torch.where(room > 0, (got - gain.mean(0)) / room, 0.0)
    return (r2 if has_unit else {}) | {"captured": captured.tolist()}


def headroom(model: RoutedLM, policy: RoutingPolicy, train: Batch, test: Batch, size: int) -> dict[str, Any]:
    """The headroom of a policy on ``test``, and what predictors fitted on ``train`` get of it; JSON-ready.

    ``layers``: by routed layer and head the mean gain, that of the best tenth, and what each predictor reaches.
    ``loss``: nats per token and selection share, each head keeping as many chunks of each sequence as under the policy:
    ``learned``, ``shuffled``, ``hindsight``, ``hindsight_in`` one layer or head only, and ``predicted`` by each
    predictor, whose routes follow from what they bring about (``ROUNDS``). ``size``: sequences at a time.
    """
    scales, predictors = _fitted(model, policy, train, size)
    subject = Subject(model, {"text": test}, size)
    learned = follow(subject, policy)
    routes = learned.routes["text"]

    def known(routes: Sequence[Tensor | None]) -> dict[int, Features]:
        return {i: scales[i](own) for i, own in observe(model, policy, test, size, routes).items()}

    features, layers = known(routes), {}
    for i, gains in measure_gains(model, policy, test, size, routes).items():
        gain = gains.flatten(0, 1)
        tenth = gain.sort(0, descending=True).values[: max(1, len(gain) // 10)]
        layers[str(i)] = {
            "gain": gain.mean(0).tolist(),
            "best_tenth": tenth.mean(0).tolist(),
            **{name: accuracy(own[i](features[i]), gains, own[i].has_unit) for name, own in predictors.items()},
        }
    predicted = {}
    for name, own in predictors.items():
        chosen = _chosen(own, features, routes)
        for _ in range(ROUNDS - 1):
            chosen = _chosen(own, known(chosen), routes)
        predicted[f"predicted: {name}"] = chosen
    return {"layers": layers, "loss": _losses(subject, learned, predicted)}


def _fitted(
    model: RoutedLM, policy: RoutingPolicy, train: Batch, size: int
) -> tuple[dict[int, Scale], dict[str, dict[int, Fitted]]]:
    """The scale of the features of each routed layer, and predictors by name and layer."""
    routes = follow(Subject(model, {"text": train}, size), policy).routes["text"]
    gains = measure_gains(model, policy, train, size, routes)
    scales, known = {}, {}
    for i, features in observe(model, policy, train, size, routes).items():
        scales[i] = Scale.of(features)
        known[i] = scales[i](features)
    device = model.embed.weight.device
    return scales, {
        f"{kind.name}, {reads}": {
            i: Fitted(reads, kind.fit(known[i][reads], gains[i], device), kind.has_unit) for i in known
        }
        for kind in KINDS
        for reads in kind.reads
    }


def _chosen(
    predictors: Mapping[int, Fitted], features: Mapping[int, Features], routes: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Routes by what predictors say of features, each head keeping as many chunks of each sequence as in ``routes``."""
    return [
        None if route is None else take(predictors[i](features[i]).transpose(1, 2), route.sum(1)).transpose(1, 2)
        for i, route in enumerate(routes)
    ]


def _losses(subject: Subject, learned: Learned, predicted: Mapping[str, Sequence[Tensor | None]]) -> dict[str, Any]:
    def nats(routing: Routing) -> Tensor:
        sets, size = subject.sets, subject.batch_size
        return count(subject.model, learned.policy, sets, routing=routing, batch_size=size)["text"].nats

    def fixed(chosen: Sequence[Tensor | None]) -> Routing:
        return lambda task, rows: [None if route is None else route[rows].float() for route in chosen]

    own, tokens = learned.counts["text"].nats, learned.counts["text"].tokens.double()
    draws = [nats(shuffled(subject, learned, draw)) for draw in range(1, min(4, len(own)))]
    others = torch.stack(draws).mean(0)
    best: list[Tensor | None] = list(hindsight(subject, learned, 0)("text", slice(None)))  # type: ignore[arg-type]
    gold = nats(fixed(best))

    def row(amount: Tensor) -> dict[str, float | None]:
        amounts = others.numpy(), amount.numpy(), gold.numpy(), tokens.numpy()
        share = selection_share(*amounts, floor_of("val_loss"))
        value, error = (None, None) if share is None else (share.value, share.error)
        return {"loss": float(amount.sum() / tokens.sum()), "share": value, "error": error}

    result: dict[str, Any] = {"learned": row(own), "shuffled": row(others), "hindsight": row(gold)}
    result |= {name: row(nats(fixed(chosen))) for name, chosen in predicted.items()}
    result["hindsight_in"] = _hindsight_in(learned, best, lambda chosen: row(nats(fixed(chosen))))
    return result


def _hindsight_in(
    learned: Learned, best: Sequence[Tensor | None], row: Callable[[list[Tensor | None]], dict[str, float | None]]
) -> dict[str, Any]:
    """The loss with hindsight in one layer only, or one head of those that keep any, and learned routes elsewhere."""
    routes = learned.routes["text"]
    result: dict[str, Any] = {}
    for i, route in enumerate(routes):
        if route is None:
            continue
        chosen = list(routes)
        chosen[i] = best[i]
        result[f"layer {i}"] = row(chosen)
        for head in range(route.shape[2]):
            if not bool(route[..., head].any()):
                continue
            mixed = route.float().clone()
            mixed[..., head] = best[i][..., head]  # type: ignore[index]
            chosen = list(routes)
            chosen[i] = mixed
            result[f"layer {i}, head {head}"] = row(chosen)
    return result
