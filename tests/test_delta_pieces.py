"""The delta branch in pieces of any sizes: from a state inside a chunk, row by row, as in one shot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from natsl.kernels.delta import DeltaState, routed_delta_rule
from natsl.kernels.segment import touched_chunks
from tests.oracles import Piece, assert_near, chunk_count, delta_inputs, leaves, make_pieces, where_kernels_run

C = 4


def one_shot(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    o, final = routed_delta_rule(*tensors, chunk_size=C, output_final_state=True)
    assert isinstance(final, Tensor)
    return o, final


def go_on(tensors: list[Tensor], state: DeltaState, lengths: Tensor | None = None) -> tuple[Tensor, DeltaState]:
    o, after = routed_delta_rule(*tensors, chunk_size=C, initial_state=state, output_final_state=True, lengths=lengths)
    assert isinstance(after, DeltaState)
    return o, after


def run_piece(inputs: list[Tensor], piece: Piece, state: DeltaState) -> tuple[Tensor, DeltaState]:
    """One piece of whole sequences; what must not be read is NaN."""
    tensors = [*(piece.cut(x) for x in inputs[:5]), piece.cut_route(inputs[5], C)]
    return go_on(tensors, state, piece.lengths)


def start_state(batch: int, dtype: torch.dtype = torch.float64) -> DeltaState:
    return DeltaState.zeros(batch, 2, 4, 3, dtype=dtype)


def loop_delta(inputs: list[Tensor]) -> tuple[Tensor, DeltaState]:
    """Outputs and state of whole sequences, one number of a row and a head after the other."""
    q, k, v, g, beta, route = inputs
    B, T, R, K = q.shape
    V = v.shape[3]
    state, out = start_state(B), torch.zeros_like(v)
    for b in range(B):
        for r in range(R):
            S, decay = [[0.0] * V for _ in range(K)], 0.0
            H = S
            for t in range(T):
                qt, kt = ((x[b, t, r] / (x[b, t, r].square().sum() + 1e-6).sqrt()).tolist() for x in (q, k))
                H = [[g[b, t, r].exp().item() * x for x in row] for row in H]
                decay += g[b, t, r].item()
                for j in range(V):
                    read = sum(H[i][j] * kt[i] for i in range(K))
                    error = beta[b, t, r].item() * (v[b, t, r, j].item() - read)
                    for i in range(K):
                        H[i][j] += kt[i] * error
                    out[b, t, r, j] = K**-0.5 * sum(H[i][j] * qt[i] for i in range(K))
                if t % C == C - 1:
                    if route[b, t // C, r] == 0:
                        S = [list(row) for row in H]
                    else:
                        S = [[math.exp(decay) * x for x in row] for row in S]
                    H, decay = S, 0.0
            state.border[b, r], state.working[b, r] = (torch.tensor(x, dtype=torch.float64) for x in (S, H))
            state.decay[b, r] = decay
            state.start[b] = T % C
    return out, state


def assert_states_near(actual: DeltaState, expected: DeltaState) -> None:
    assert torch.equal(actual.start, expected.start)
    for x, y in zip(actual[:3], expected[:3], strict=True):
        assert_near(x, y)


@pytest.mark.parametrize("T", [1, 3, 4, 11])
def test_state_equals_a_plain_loop(T: int) -> None:
    inputs = delta_inputs(T)
    expected, expected_state = loop_delta(inputs)
    everything = Piece(T, torch.zeros(2, dtype=torch.int64), torch.full((2,), T))
    o, state = run_piece(inputs, everything, start_state(2))
    assert_near(o, expected)
    assert_states_near(state, expected_state)


@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_any_sizes_equal_one_shot(seed: int) -> None:
    totals = [30, 23, 12, 9, 2]
    inputs = delta_inputs(30, B=5)
    whole = []
    for b, n in enumerate(totals):
        alone = [*(x[b : b + 1, :n] for x in inputs[:5]), inputs[5][b : b + 1, : chunk_count(n, C)]]
        whole.append(one_shot(alone)[0])
    state = start_state(5)
    for piece in make_pieces(totals, C, seed):
        o, state = run_piece(inputs, piece, state)
        assert o.isfinite().all()
        for b, (done, length) in enumerate(zip(piece.done.tolist(), piece.lengths.tolist(), strict=True)):
            assert_near(o[b, :length], whole[b][0, done : done + length])
        assert torch.equal(state.start, (piece.done + piece.lengths) % C)
        at_border = state.start == 0
        assert torch.equal(state.working[at_border], state.border[at_border])
        assert not state.decay[at_border].any()
    everything = Piece(30, torch.zeros(5, dtype=torch.int64), torch.tensor(totals))
    assert_states_near(state, run_piece(inputs, everything, start_state(5))[1])
    for b, n in enumerate(totals):
        if n >= C:
            border = n // C * C
            _, expected = one_shot([*(x[b : b + 1, :border] for x in inputs[:5]), inputs[5][b : b + 1, : border // C]])
            assert_near(state.border[b], expected[0])


@pytest.mark.parametrize("n", range(C - 1, 2 * C + 2))
def test_prefill_then_single_tokens_equal_one_shot(n: int) -> None:
    T = 4 * C
    inputs = delta_inputs(T)
    whole, final = one_shot(inputs)
    state = start_state(2)
    for a, b in [(0, n), *((t, t + 1) for t in range(n, T))]:
        piece = Piece(b - a, torch.full((2,), a), torch.full((2,), b - a))
        o, state = run_piece(inputs, piece, state)
        assert_near(o, whole[:, a:b])
    assert_near(state.border, final)


def test_token_form_equals_chunk_form() -> None:
    inputs = delta_inputs(1, B=2 * C)
    border, working = (torch.randn(2 * C, 2, 4, 3).double() for _ in range(2))
    state = DeltaState(border, working, -torch.rand(2 * C, 2).double(), torch.arange(2 * C) % C)
    lengths = (torch.arange(2 * C) < C).long()
    o, after = go_on(inputs, state, lengths)
    two = [torch.cat((x, torch.full_like(x, float("nan"))), 1) for x in inputs[:5]]
    wanted, expected = go_on([*two, inputs[5].expand(-1, touched_chunks(2, C), -1)], state, lengths)
    assert_near(o[:C], wanted[:C, :1])
    assert_states_near(after, expected)
    for x, y in zip(after, state, strict=True):
        assert torch.equal(x[C:], y[C:]), "a row without a token keeps its state"


@pytest.mark.parametrize("cuts", [[3, 7, 8, 20], list(range(1, 21))], ids=["pieces", "tokens"])
def test_gradients_flow_through_pieces(cuts: list[int]) -> None:
    inputs = delta_inputs(20)
    ours, theirs = leaves(inputs), leaves(inputs)
    whole, final = one_shot(theirs)
    outputs, state, a = [], start_state(2), 0
    for b in cuts:
        chunks = ours[5][:, a // C : a // C + touched_chunks(b - a, C)]
        missing = touched_chunks(b - a, C) - chunks.shape[1]
        route = torch.cat((chunks, chunks.new_zeros(2, missing, 2)), 1)
        o, state = go_on([*(x[:, a:b] for x in ours[:5]), route], state)
        outputs.append(o)
        a = b
    do, ds = torch.randn_like(whole), torch.randn_like(final)
    wanted = torch.autograd.grad((whole * do).sum() + (final * ds).sum(), theirs)
    actual = torch.autograd.grad((torch.cat(outputs, 1) * do).sum() + (state.border * ds).sum(), ours)
    for x, y in zip(actual, wanted, strict=True):
        assert_near(x, y)


def test_a_full_decay_inside_the_open_chunk() -> None:
    inputs = delta_inputs(12)
    inputs[3][:, 5] = float("-inf")
    whole, final = one_shot(inputs)
    state = start_state(2)
    for a, b in ((0, 3), (3, 6), (6, 7), (7, 12)):
        o, state = run_piece(inputs, Piece(b - a, torch.full((2,), a), torch.full((2,), b - a)), state)
        assert_near(o, whole[:, a:b])
    assert_near(state.border, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_pieces(dtype: torch.dtype) -> None:
    inputs = [*(x.to(dtype) for x in delta_inputs(13)[:3]), *(x.float() for x in delta_inputs(13)[3:])]
    exact, state, expected = [x.double() for x in inputs], start_state(2, torch.float32), start_state(2)
    for piece in make_pieces([13, 10], C):
        o, state = run_piece(inputs, piece, state)
        wanted, expected = run_piece(exact, piece, expected)
        assert o.dtype is dtype
        assert_near(o, wanted)
        assert [x.dtype for x in state] == [torch.float32] * 3 + [torch.int64]
    for x, y in zip(state[:3], expected[:3], strict=True):
        assert_near(x, y, torch.float32)


@pytest.mark.parametrize("T", [1, 9])
def test_pieces_read_no_value_of_a_tensor(T: int) -> None:
    """Tensors without data stand for a device that nobody waits for."""
    tensors = [x.to("meta") for x in delta_inputs(T)[:5]]
    state = DeltaState.zeros(2, 2, 4, 3, device="meta", dtype=torch.float64)
    route = torch.empty(2, touched_chunks(T, C), 2, device="meta")
    o, after = go_on([*tensors, route], state, state.start)
    assert o.shape == (2, T, 2, 3)
    assert [x.shape for x in after] == [x.shape for x in state]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_state": None, "lengths": torch.tensor([1, 2])}, "lengths needs a DeltaState"),
        ({"initial_state": torch.ones(2, 2, 4, 3), "lengths": torch.tensor([1, 2])}, "lengths needs a DeltaState"),
        ({"lengths": torch.tensor([1])}, "lengths has shape \\(1,\\), expected \\(2,\\)"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens cannot be combined with a DeltaState"),
        ({"counterfactual": "derivative"}, "counterfactual = 'derivative' with a DeltaState, it must be 'none'"),
        ({"backend": "triton"}, "torch.float64 is not supported by the triton backend"),
        ({"backend": "cuda"}, "backend = 'cuda' is not allowed"),
        ({"route": torch.ones(2, 2, 2)}, "route has shape \\(2, 2, 2\\), expected \\(2, 3, 2\\)"),
        (
            {"initial_state": start_state(3)},
            "initial_state.border has shape \\(3, 2, 4, 3\\), expected \\(2, 2, 4, 3\\)",
        ),
        (
            {"initial_state": start_state(2)._replace(decay=torch.zeros(2))},
            "initial_state.decay has shape \\(2,\\), expected \\(2, 2\\)",
        ),
        (
            {"initial_state": start_state(2)._replace(start=torch.zeros(2))},
            "initial_state.start must be an int64 tensor, found torch.float32",
        ),
        (
            {"initial_state": start_state(2)._replace(working=torch.zeros(2, device="meta"))},
            "initial_state.working is on meta, but q is on cpu",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_mistakes_with_a_state_inside_a_chunk(change: dict[str, object], message: str) -> None:
    names = ("q", "k", "v", "g", "beta", "route")
    arguments: dict[str, object] = {**dict(zip(names, delta_inputs(9), strict=True)), "chunk_size": C}
    arguments = {**arguments, "initial_state": start_state(2), **change}
    if change.get("backend") == "triton":
        arguments = where_kernels_run(arguments)
    with pytest.raises(ValueError, match=message):
        routed_delta_rule(**arguments)  # type: ignore[arg-type]
