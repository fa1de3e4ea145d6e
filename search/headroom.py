"""How much choosing chunks could gain in a trained supernet, and how much of that is known when a chunk is routed.

The gain of a chunk is what keeping it, instead of writing it to the state, takes off the loss of its sequence: exact to
first order, chunks left out by the effect of inserting them (docs/method.md). Predictors of gains are fitted on text of
the training part with the supernet frozen, from what a layer knows at the end of the chunk. They bound from below what
a router with such inputs could get from this supernet; one that is trained along with it changes the supernet as well.

Shapes: B sequences, T tokens, C chunk size, N = T / C chunks, D width, R routing heads, F features, M = B·N chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from natsl.search.ablation.record import RANKING
from natsl.search.controls.comparison import floor_of, selection_share
from natsl.search.controls.hindsight import gains_of, hindsight, take
from natsl.search.controls.learned import Learned, Subject, follow
from natsl.search.controls.routes import shuffled
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks.sequences import Batch

# Features of a chunk, and which of them a predictor reads.
HIDDEN, CONV, SIGNALS = "hidden", "conv", "signals"
READS = {"hidden": (HIDDEN,), "conv": (CONV,), "signals": (SIGNALS,), "all": (HIDDEN, CONV, SIGNALS)}
FLOOR = 0.125  # share of the sequence left after a chunk, below which its gain is not scaled up further
RIDGE = 3e-3  # of the standardised features' variance
STEPS, ROWS, HIDDEN_UNITS = 1500, 4096, 64  # training of a small network

Predictor: TypeAlias = Callable[[Tensor], Tensor]  # standardised features [M,F] → predictions [M,R]


@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen of the chunks of some sequences in one layer, on the CPU.

    ``features`` name → float32 [B,N,F]; ``gains`` float32 [B,N,R], nats of the whole sequence (empty [B,N,0]: they
    were not asked for).
    """

    features: dict[str, Tensor]
    gains: Tensor

    def read(self, names: Sequence[str]) -> Tensor:
        """The features of these names, [M,F]."""
        return torch.cat([self.features[name] for name in names], -1).flatten(0, 1)

    def rates(self) -> tuple[Tensor, Tensor]:
        """Gains per share of the sequence that is left after the chunk [M,R], and that share as a weight [M,1].

        Early chunks have more queries to come: a router does not know how many.
        """
        N = self.gains.shape[1]
        left = ((N - 1 - torch.arange(N)) / N)[None, :, None]
        weight = left.expand(len(self.gains), -1, 1)
        return (self.gains / left.clamp(min=FLOOR)).flatten(0, 1), weight.flatten(0, 1)


def features_of(mixer: RoutedMixer, x: Tensor, keep: Tensor, skip: Tensor) -> dict[str, Tensor]:
    """What a layer knows of its chunks when it routes them: its normed input x [B,T,D], routes [B,N,R] so far.

    ``hidden`` [B,N,D] and ``conv`` [B,N,channels]: means of the input, and of queries, keys and values after the
    convolution. ``signals`` [B,N,7·R] per head: decay and write strength; mean and largest relative error of what the
    state returns for a key before its value is written; magnitude of values; the largest share of attention that a key
    gets inside its own chunk; cosine between the chunk's mean key and the nearest one of the chunks kept before.
    """
    c = mixer.config
    C, R = c.chunk_size, c.heads
    x = x.float()
    qkv = short_convolution(mixer.qkv_proj(x), mixer.conv)
    parts = mixer.split(qkv)
    _, k, v = mixer.delta_heads(*parts)
    g, beta = mixer.gates(x)
    ahead = F.pad(k[:, 1:], (0, 0, 0, 0, 0, 1)).contiguous()  # asks for a key's value one token before it is written
    state, _ = routed_delta_rule(ahead, k.contiguous(), v.contiguous(), g, beta, skip, chunk_size=C)
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
    seen = earlier[None, :, :, None] & (keep[:, None] > 0.5)
    signals = (
        *(chunk_means(y.float(), C) for y in (g, beta)),
        error.mean(2),
        error.amax(2),
        chunk_means(size.sqrt(), C),
        shares.amax(-1).unflatten(2, (R, -1)).mean(-1),
        near.masked_fill(~seen, -1.0).amax(2),
    )
    return {HIDDEN: chunk_means(x, C), CONV: chunk_means(qkv.float(), C), SIGNALS: torch.cat(signals, -1)}


def observe(
    model: RoutedLM,
    policy: RoutingPolicy,
    batch: Batch,
    size: int,
    routes: Sequence[Tensor | None] | None = None,
    gains: bool = True,
) -> dict[int, Observation]:
    """Features of all chunks, and their gains under a policy (or fixed routes), by routed layer; ``size`` at a time.

    The length must be a multiple of the chunk size. Without ``gains`` there is no backward pass.
    """
    layers = [i for i, layer in enumerate(policy.layers) if layer.op is Op.routed]
    parts: dict[int, list[Observation]] = {i: [] for i in layers}
    device = model.embed.weight.device
    inputs: dict[int, Tensor] = {}
    mixers: dict[int, RoutedMixer] = {i: model.get_submodule(f"blocks.{i}.mixer") for i in layers}  # type: ignore[misc]

    def hold(i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[i] = arguments[0].detach()

        return hook

    hooks = [mixer.register_forward_pre_hook(hold(i)) for i, mixer in mixers.items()]
    model.eval()
    try:
        for first in range(0, len(batch), size):
            rows = slice(first, first + size)
            part = batch.rows(rows).to(device)
            own = None if routes is None else [None if r is None else r[rows].float().to(device) for r in routes]
            with torch.no_grad():
                output = model(part.tokens, policy, routes=own, logits_to_keep=0)
                features = {
                    i: features_of(mixer, inputs[i], output.layers[i].route, output.layers[i].skip)
                    for i, mixer in mixers.items()
                }
            kept = [layer.route if i in layers else None for i, layer in enumerate(output.layers)]
            gained = gains_of(model, policy, part, kept) if gains else [None] * len(kept)
            for i in layers:
                gain = gained[i]
                known = output.layers[i].route[..., :0] if gain is None else gain
                seen = {name: value.float().cpu() for name, value in features[i].items()}
                parts[i].append(Observation(seen, known.float().cpu()))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        i: Observation(
            {name: torch.cat([part.features[name] for part in own]) for name in own[0].features},
            torch.cat([part.gains for part in own]),
        )
        for i, own in parts.items()
    }


@dataclass(frozen=True, eq=False)
class Fitted:
    """A predictor of gains with the scaling of what it reads: ``names`` of features, their mean and deviation [F]."""

    names: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    predict: Predictor

    def __call__(self, seen: Observation) -> Tensor:
        """Predicted gains per share of the sequence that is left, float32 [B,N,R] on the CPU."""
        x = (seen.read(self.names) - self.mean) / self.deviation
        rates: Tensor = self.predict(x).float().cpu().unflatten(0, seen.gains.shape[:2])
        return rates


def standardised(seen: Observation, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The features of these names, each with mean 0 and variance 1, [M,F]; and their mean and deviation [F]."""
    x = seen.read(names)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    return (x - mean) / deviation, mean, deviation


def fit_ridge(seen: Observation, names: Sequence[str], device: torch.device) -> Fitted:
    """Ridge regression of rates on features, weighted by what is left of the sequence."""
    x, mean, deviation = standardised(seen, names)
    y, weight = _clipped(seen)
    one = torch.ones(len(x), 1)
    x, y, w = (part.to(device, torch.float64) for part in (torch.cat((x, one), 1), y, weight))
    gram = x.T @ (w * x)
    gram.diagonal().add_(RIDGE * float(w.sum()))
    solution = torch.linalg.solve(gram, x.T @ (w * y)).float()

    def predict(features: Tensor) -> Tensor:
        z: Tensor = F.pad(features.to(device), (0, 1), value=1.0) @ solution
        return z

    return Fitted(tuple(names), mean, deviation, predict)


def fit_ranking(seen: Observation, names: Sequence[str], device: torch.device) -> Fitted:
    """A linear score fitted to order pairs of chunks by their rates, each pair weighted by the difference."""
    return _fit(seen, names, device, nn.Linear, _pair_loss)


def fit_network(seen: Observation, names: Sequence[str], device: torch.device) -> Fitted:
    """Regression of rates by a network with one hidden layer."""

    def build(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, HIDDEN_UNITS), nn.SiLU(), nn.Dropout(0.2), nn.Linear(HIDDEN_UNITS, outputs)
        )

    return _fit(seen, names, device, build, lambda z, y, w: (w * (z - y).square()).mean())


FITS = (
    ("ridge", fit_ridge, ("hidden", "conv", "signals", "all")),
    (RANKING, fit_ranking, ("all",)),
    ("network", fit_network, ("signals", "all")),
)


def _pair_loss(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    score, rate, weight = z - z.roll(1, 0), y - y.roll(1, 0), torch.minimum(w, w.roll(1, 0))
    return (weight * rate.abs() * F.softplus(-score * rate.sign())).mean()


def _fit(
    seen: Observation,
    names: Sequence[str],
    device: torch.device,
    build: Callable[[int, int], nn.Module],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Fitted:
    x, mean, deviation = standardised(seen, names)
    y, w = _clipped(seen)
    unit = (y.std(0) + 1e-9).to(device)
    x, y, w = (part.to(device) for part in (x, y, w))
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

    return Fitted(tuple(names), mean, deviation, predict)


def _clipped(seen: Observation) -> tuple[Tensor, Tensor]:
    """Rates and weights, without the tails: a rate is at most ten times its head's mean magnitude."""
    rate, weight = seen.rates()
    bound = 10 * rate.abs().mean(0)
    return rate.clamp(-bound, bound), weight


def accuracy(predicted: Tensor, seen: Observation) -> dict[str, list[float]]:
    """How well predictions [B,N,R] do, by head.

    ``r2`` of the clipped rates, of a prediction in their unit; ``captured``: what the tenth of the chunks with the
    highest predictions gains, 0 being a random tenth and 1 that with the highest rates. 0 where all gain the same.
    """
    y, w = _clipped(seen)
    z = predicted.flatten(0, 1)
    mean = (w * y).sum(0) / w.sum()
    spread = (w * (y - mean).square()).sum(0)
    r2 = torch.where(spread > 0, 1 - (w * (y - z).square()).sum(0) / spread, 0.0)
    gain = seen.gains.flatten(0, 1)
    tenth = max(1, len(gain) // 10)
    rate, _ = seen.rates()
    best, got = (gain.gather(0, x.argsort(0, descending=True)[:tenth]).mean(0) for x in (rate, z))
    room = best - gain.mean(0)
    captured = torch.where(room > 0, (got - gain.mean(0)) / room, 0.0)
    return {"r2": r2.tolist(), "captured": captured.tolist()}


def headroom(model: RoutedLM, policy: RoutingPolicy, train: Batch, test: Batch, size: int) -> dict[str, Any]:
    """The headroom of a policy on ``test``, and what predictors fitted on ``train`` get of it; JSON-ready.

    ``layers``: by routed layer and head the mean gain, that of the best tenth, and what each predictor reaches.
    ``loss``: nats per token and selection share, each head keeping as many chunks of each sequence as under the policy:
    ``learned``, ``shuffled``, ``hindsight``, ``hindsight_in`` one layer or head only, and ``predicted`` by each
    predictor, whose routes follow from what they bring about (three rounds). ``size``: sequences at a time.
    """
    device = model.embed.weight.device
    fitted_on = observe(model, policy, train, size)
    routed = list(fitted_on)
    predictors = {
        f"{kind}, {reads}": {i: fit(fitted_on[i], READS[reads], device) for i in routed}
        for kind, fit, inputs in FITS
        for reads in inputs
    }
    seen = observe(model, policy, test, size)
    layers = {}
    for i in routed:
        gain = seen[i].gains.flatten(0, 1)
        tenth = gain.sort(0, descending=True).values[: max(1, len(gain) // 10)]
        layers[str(i)] = {
            "gain": gain.mean(0).tolist(),
            "best_tenth": tenth.mean(0).tolist(),
            **{name: accuracy(own[i](seen[i]), seen[i]) for name, own in predictors.items()},
        }
    return {"layers": layers, "loss": _losses(model, policy, test, size, predictors)}


def _losses(
    model: RoutedLM, policy: RoutingPolicy, test: Batch, size: int, predictors: dict[str, dict[int, Fitted]]
) -> dict[str, Any]:
    subject = Subject(model, {"text": test}, size)
    learned = follow(subject, policy)
    routes = learned.routes["text"]

    def nats(routing: Routing) -> Tensor:
        return count(model, policy, subject.sets, routing=routing, batch_size=size)["text"].nats

    def fixed(chosen: Sequence[Tensor | None]) -> Routing:
        return lambda task, rows: [None if route is None else route[rows].float() for route in chosen]

    draws = [nats(shuffled(subject, learned, draw)) for draw in range(1, min(4, len(test)))]
    others = torch.stack(draws).mean(0)
    best: list[Tensor | None] = list(hindsight(subject, learned, 0)("text", slice(None)))  # type: ignore[arg-type]
    gold, own = nats(fixed(best)), learned.counts["text"].nats
    tokens = learned.counts["text"].tokens.double()

    def row(amount: Tensor) -> dict[str, float | None]:
        amounts = others.numpy(), amount.numpy(), gold.numpy(), tokens.numpy()
        share = selection_share(*amounts, floor_of("val_loss"))
        value, error = (None, None) if share is None else (share.value, share.error)
        return {"loss": float(amount.sum() / tokens.sum()), "share": value, "error": error}

    result: dict[str, Any] = {"learned": row(own), "shuffled": row(others), "hindsight": row(gold)}
    for name, fitted in predictors.items():
        chosen = list(routes)
        for _ in range(3):
            seen = observe(model, policy, test, size, chosen, gains=False)
            for i, predictor in fitted.items():
                route = routes[i]
                assert route is not None
                score = predictor(seen[i]).transpose(1, 2)
                chosen[i] = take(score, route.sum(1)).transpose(1, 2)
        result[f"predicted: {name}"] = row(nats(fixed(chosen)))
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
