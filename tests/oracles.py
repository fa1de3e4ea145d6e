"""The routed ops once more, in their plainest form: what the tests hold the kernels against.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, Hq/Hs query/key softmax heads, K/V key/value width.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from natsl.calibration import Calibration
from natsl.compiled import compile_policies
from natsl.config import ModelConfig, Precision, RouteGradient
from natsl.data import Corpus, TaskData
from natsl.layout import Layout
from natsl.mixer import BIAS_GAIN, RoutedMixer
from natsl.model import Block, RoutedLM
from natsl.router import LayerContext, RoutePair
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks import DataConfig

# Largest error, relative to the largest entry of the expected tensor, by dtype; the same in every test.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless ``actual`` equals ``expected`` within the tolerance of ``dtype`` (default: that of ``actual``)."""
    assert actual.shape == expected.shape
    expected = expected.double()
    bound = TOLERANCE[dtype or actual.dtype] * max(
        1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0
    )
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def where_kernels_run(arguments: dict[str, object]) -> dict[str, object]:
    """The arguments with their tensors on the GPU if there is one: without Triton's interpreter kernels need it."""
    if not torch.cuda.is_available():
        return arguments
    return {name: _on_gpu(x) for name, x in arguments.items()}


def _on_gpu(x: object) -> object:
    """A tensor or a named tuple of tensors, such as a state, on the GPU; anything else as it is."""
    if isinstance(x, Tensor):
        return x.cuda()
    return x._make(map(_on_gpu, x)) if isinstance(x, tuple) and hasattr(x, "_make") else x


def chunk_count(tokens: int, chunk_size: int) -> int:
    return -(-tokens // chunk_size)


def visible(route: Tensor, tokens: int, chunk_size: int, heads: int) -> Tensor:
    """Which keys each query sees: bool [B,heads,T,T], from routes of 0 and 1 [B,N,R], query by query."""
    B, _, R = route.shape
    mask = torch.zeros(B, heads, tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        for s in range(t + 1):
            c = s // chunk_size
            for h in range(heads):
                kept = route[:, c, h // (heads // R)] == 1
                mask[:, h, t, s] = True if c == t // chunk_size else kept
    return mask


def dense_softmax(q: Tensor, k: Tensor, v: Tensor, route: Tensor, *, chunk_size: int, scale: float) -> Tensor:
    """The relaxed softmax branch as one dense formula, differentiable in everything: an earlier key weighs a·exp(s)."""
    T, Hq, Hs, R = q.shape[1], q.shape[2], k.shape[2], route.shape[2]
    k, v = k.repeat_interleave(Hq // Hs, 2), v.repeat_interleave(Hq // Hs, 2)
    a = route.repeat_interleave(Hq // R, 2).repeat_interleave(chunk_size, 1)[:, :T].permute(0, 2, 1)[:, :, None]
    score = torch.einsum("bthk,bshk->bhts", q, k) * scale
    place = torch.arange(T)
    chunk = place // chunk_size
    causal = place[:, None] >= place[None]
    weight = torch.where(chunk[:, None] == chunk[None], torch.ones_like(a), a) * causal
    score = score.masked_fill(~causal, float("-inf"))
    score = score - score.detach().masked_fill(weight == 0, float("-inf")).amax(-1, keepdim=True)
    p = weight * score.exp()
    return torch.einsum("bhts,bshv->bthv", p / p.sum(-1, keepdim=True), v)


def token_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int,
    qk_l2norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """The delta branch token by token: outputs [B,T,R,V] and the final state [B,R,K,V]."""
    B, T, R, K = q.shape
    if qk_l2norm:
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(B, R, K, v.shape[3]) if initial_state is None else initial_state
    working, decayed = state, state
    outputs = []
    for t in range(T):
        if t % chunk_size == 0:
            working = decayed = state
        decay = g[:, t].exp()[..., None, None]
        working, decayed = decay * working, decay * decayed
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("brkv,brk->brv", working, k[:, t]))
        working = working + k[:, t, :, :, None] * error[:, :, None]
        outputs.append(K**-0.5 * torch.einsum("brkv,brk->brv", working, q[:, t]))
        if t % chunk_size == chunk_size - 1 or t == T - 1:
            a = route[:, t // chunk_size, :, None, None]
            state = (1 - a) * working + a * decayed
    return torch.stack(outputs, 1), state


class Piece(NamedTuple):
    """One call of sequences that come in pieces: rows with ``done`` tokens before and ``lengths`` of ``tokens`` now."""

    tokens: int
    done: Tensor  # [B]
    lengths: Tensor  # [B]

    def cut(self, x: Tensor) -> Tensor:
        """The piece [B,tokens,…] of whole sequences x [B,T,…]; its padding is NaN."""
        out = x.new_full((x.shape[0], self.tokens, *x.shape[2:]), float("nan"))
        for row, (done, length) in enumerate(zip(self.done.tolist(), self.lengths.tolist(), strict=True)):
            out[row, :length] = x[row, done : done + length]
        return out

    def cut_route(self, route: Tensor, chunk_size: int) -> Tensor:
        """Routes of the touched chunks, from those of the whole sequences [B,N,R]; NaN for chunks not complete."""
        touched = (self.tokens + chunk_size - 2) // chunk_size + 1
        out = route.new_full((route.shape[0], touched, route.shape[2]), float("nan"))
        for row, (done, length) in enumerate(zip(self.done.tolist(), self.lengths.tolist(), strict=True)):
            first, last = done // chunk_size, (done + length) // chunk_size
            out[row, : last - first] = route[row, first:last]
        return out


def make_pieces(totals: list[int], chunk_size: int, seed: int = 0) -> list[Piece]:
    """Random pieces of rows of ``totals`` tokens: of 1, C − 1, C, C + 1 and 2C + 3 columns; some rows sit some out."""
    rng = random.Random(seed)
    done, pieces = [0] * len(totals), []
    while done != totals:
        tokens = rng.choice([1, chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size + 3])
        room = [min(tokens, total - d) for total, d in zip(totals, done, strict=True)]
        lengths = [rng.choice([0, n, n, rng.randint(0, n)]) for n in room]
        pieces.append(Piece(tokens, torch.tensor(done), torch.tensor(lengths)))
        done = [d + n for d, n in zip(done, lengths, strict=True)]
    return pieces


def softmax_inputs(
    T: int, *, B: int = 2, R: int = 2, G: int = 1, J: int = 1, C: int = 4, K: int = 4, V: int = 3
) -> list[Tensor]:
    """Random float64 q, k, v and routes of 0 and 1 for the softmax branch (J query heads per key head)."""
    q, k, v = (torch.randn(B, T, h, w).double() for h, w in ((R * G * J, K), (R * G, K), (R * G, V)))
    return [q, k, v, (torch.rand(B, chunk_count(T, C), R) < 0.5).double()]


def delta_inputs(T: int, *, B: int = 2, R: int = 2, C: int = 4, K: int = 4, V: int = 3) -> list[Tensor]:
    """Random float64 q, k, v, g, beta and routes of 0 and 1 for the delta branch."""
    q, k, v = (torch.randn(B, T, R, w).double() for w in (K, K, V))
    g, beta = -torch.rand(B, T, R).double(), torch.rand(B, T, R).double()
    return [q, k, v, g, beta, (torch.rand(B, chunk_count(T, C), R) < 0.5).double()]


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that collect gradients."""
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def assert_compiles(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Fail unless a scalar function is one graph for ``torch.compile`` and keeps its gradients in it."""
    eager, compiled = leaves(inputs), leaves(inputs)
    expected = torch.autograd.grad(function(*eager), eager)
    torch._dynamo.reset()
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(whole(*compiled), compiled), expected, strict=True):
        assert_near(x, y)


def tiny_config(kinds: str = "rrr", **options: object) -> ModelConfig:
    """A model of some 20k parameters in chunks of 8; ``kinds``: one letter per layer, d(elta), s(oftmax), r(outed)."""
    layers = [{"d": Op.delta, "s": Op.softmax, "r": Op.routed}[letter] for letter in kinds]
    shape: dict[str, object] = {"width": 16, "mlp_width": 24, "heads": 2, "key_dim": 8, "value_dim": 8, "chunk_size": 8}
    return ModelConfig(layers=layers, **{**shape, **options})  # type: ignore[arg-type]


def tiny_model(kinds: str = "rrr", precision: Precision = Precision.float32, **options: object) -> RoutedLM:
    """A ``tiny_config`` model whose parameters are all far from zero, so that every path shows in the logits."""
    model = RoutedLM(tiny_config(kinds, **options), 17, precision)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mix_proj" in name or "router" in name:
                parameter.normal_(std=0.5)
        for name, parameter in model.named_parameters():
            if "mix_bias" in name:
                parameter.normal_(std=0.5 / BIAS_GAIN)
    return model.eval()


def mixer_of(model: RoutedLM, layer: int = 0) -> RoutedMixer:
    """The mixer of one layer."""
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block.mixer


def layer_context(
    policies: Sequence[LayerPolicy],
    batch: int,
    lengths: Tensor | None = None,
    route: Tensor | RoutePair | None = None,
    gradient: RouteGradient | None = None,
    *,
    kind: Op = Op.routed,
    heads: int = 2,
) -> LayerContext:
    """What a single layer of this kind is given for policies of equal slices of a batch; it has no calibration."""
    groups = [RoutingPolicy((policy,), 8) for policy in policies]
    compiled = compile_policies(groups, [kind], heads, Calibration(1, heads, 17), batch)
    return LayerContext(compiled.layer(0), Layout(lengths), None, route, gradient)


def fill_calibration(model: RoutedLM) -> None:
    """A calibration table that is good enough for tests of everything else: evenly spread thresholds around 0."""
    table = model.calibration
    for buffer in (table.by_layer, table.by_head):
        buffer.copy_(2 * table.levels - 1)


def tiny_data(**options: object) -> TaskData:
    """mqar on random letters, 64 tokens a sequence."""
    parts = [torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(i)).byte() for i in range(3)]
    corpus = Corpus(parts[0], parts[1], parts[2], fingerprint="letters", description="letters", files=3)
    settings: dict[str, object] = {"seq_len": 64, "search_sequences": 8, "test_sequences": 8}
    return TaskData(DataConfig(**{**settings, **options}), corpus, 384)  # type: ignore[arg-type]


def triton_modules() -> list[ModuleType]:
    """The modules of all Triton kernels."""
    paths = sorted((Path(__file__).parents[1] / "kernels" / "_triton").glob("*.py"))
    return [importlib.import_module(f"natsl.kernels._triton.{path.stem}") for path in paths]
