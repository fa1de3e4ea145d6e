"""Single tokens through the kernels of ``decode_step``, against the model's forward pass from the same cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from natsl.cache import Cache
from natsl.config import Precision
from natsl.decode import Decoder
from natsl.kernels._triton import decode as kernels
from natsl.kernels.bench import decode as bench
from natsl.kernels.decode import LARGEST_HEADS, DecodePolicy, DecodeState, decode_step
from natsl.kernels.pages import KeyPages
from natsl.kernels.shape import Shape
from natsl.layout import Layout
from natsl.mixer import RoutedMixer
from natsl.model import RoutedLM
from natsl.router import Router
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import fill_calibration, tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
C = 16
D, S = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)
CAPPED = LayerPolicy(threshold=-0.5, cap=0.4, burst=1, mix_temperature=2.0)
HEADS = LayerPolicy(threshold=(0.1, -0.1))


def model_of(kinds: str = "rsdr", precision: Precision = Precision.float32, **options: Any) -> RoutedLM:
    """A model whose routers decide differently for every chunk, and whose mix depends on everything it may."""
    torch.manual_seed(0)
    options = {"rope": True, "router_norm": True, "chunk_size": C, "key_dim": 12, "value_dim": 20, **options}
    model = tiny_model(kinds, **options)
    for module in model.modules():
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=0.5)
            if module.norm:
                module.mean.normal_(std=0.1)  # about what the means of chunks are
                module.variance.uniform_(0.03, 0.1)
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, RoutedMixer):
            for name, parameter in module.named_parameters():
                if name.startswith("mix_"):
                    nn.init.normal_(parameter, std=0.3)
                elif name == "dt_bias":
                    parameter.data.fill_(-1.0)  # the state forgets within chunks
    fill_calibration(model)
    model = RoutedLM(model.config, precision=precision) if precision is not Precision.float32 else model
    return model.eval().to(DEVICE)


def used(pages: KeyPages) -> list[list[Tensor]]:
    """Keys and values of every head's pages in order, and its table."""
    places = torch.arange(pages.table.shape[2], device=pages.table.device) <= pages.kept[..., None]
    table = pages.table[places]
    return [[table], [pages.keys[table]], [pages.values[table]]]


def check_steps(
    model: RoutedLM,
    policies: Sequence[RoutingPolicy],
    *,
    read: Sequence[int] = (13, 14, 46, 79),
    steps: int = 5,
    tolerance: float = 1e-4,
    change: dict[int, Sequence[RoutingPolicy]] | None = None,
    still: int | None = None,
) -> tuple[Cache, Decoder]:
    """Read so many tokens of each row, then one more of each row ``steps`` times: both ways, on caches of their own.

    ``change``: policies from a step on. ``still``: a row that has no tokens after the first step.
    """
    B = len(read)
    x = torch.randint(model.config.vocab_size, (B, max(read) + steps), device=DEVICE)
    mask = torch.arange(max(read))[None] < torch.tensor(read)[:, None]
    ours = model.new_cache(B)
    model(x[:, : max(read)], policies, layout=Layout.padded(mask.to(DEVICE)), cache=ours)
    theirs = copy.deepcopy(ours)
    decoder = Decoder(model, policies, ours)
    for i in range(steps):
        if change and i in change:
            policies = change[i]
            decoder.set_policy(policies)
        token, live = x[:, max(read) + i], torch.ones(B, dtype=torch.bool, device=DEVICE)
        if still is not None and i > 0:
            live[still] = False
        layout = None if bool(live.all()) else Layout(live.long())
        expected = model(token[:, None], policies, layout=layout, cache=theirs).logits
        assert expected is not None
        actual = decoder.step(token, None if layout is None else live)
        torch.testing.assert_close(actual[live], expected[live, 0], rtol=0, atol=tolerance)
    assert torch.equal(ours.lengths, theirs.lengths)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.tail, b.tail, rtol=0, atol=tolerance)
        if b.total is not None:
            torch.testing.assert_close(a.total, b.total, rtol=0, atol=tolerance)
        if a.delta is not None and b.delta is not None:
            for one, two in zip(a.delta, b.delta, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=tolerance)
        if a.pages is not None and b.pages is not None:
            assert torch.equal(a.pages.kept, b.pages.kept)
            filled = (a.pages.kept * C + (ours.lengths % C)[:, None]).flatten()
            for (one,), (two,) in zip(used(a.pages), used(b.pages), strict=True):
                if one.dim() == 1:
                    assert torch.equal(one, two)
                    continue
                chunks = (a.pages.kept + 1).flatten().tolist()
                for n, mine, other in zip(filled.tolist(), one.split(chunks), two.split(chunks), strict=True):
                    torch.testing.assert_close(mine.flatten(0, 1)[:n], other.flatten(0, 1)[:n], rtol=0, atol=tolerance)
    return ours, decoder


def test_steps_are_the_forward_pass() -> None:
    model = model_of()
    cache, _ = check_steps(model, [RoutingPolicy((HEADS, S, D, CAPPED), C)])
    kept = [layer.pages.kept for layer in cache.layers if layer.pages is not None]
    assert kept[1].tolist() == [[1, 1], [1, 1], [3, 3], [5, 5]]
    assert 0 < kept[0].sum() < kept[1].sum(), "some chunks are kept and some are not"
    assert 0 < kept[2].sum() < kept[1].sum()


@pytest.mark.parametrize(
    "options",
    [
        {"softmax_per_head": 2, "heads": 3},
        {"rope": False, "router_norm": False, "conv_width": 1},
        {"conv_width": 2, "key_dim": 10, "value_dim": 34, "heads": 1},
    ],
    ids=str,
)
def test_shapes(options: dict[str, Any]) -> None:
    check_steps(model_of("r", **options), [RoutingPolicy((LayerPolicy(budget=0.5),), C)])


@pytest.mark.parametrize("kind", ["d", "s"])
def test_layers_with_one_memory(kind: str) -> None:
    check_steps(model_of(kind), [RoutingPolicy(({"d": D, "s": S}[kind],), C)])


def test_rows_stand_anywhere_and_have_policies_of_their_own() -> None:
    model = model_of("rr")
    policies = [RoutingPolicy(layers, C) for layers in ((D, HEADS), (HEADS, S), (CAPPED, D), (S, CAPPED))]
    later = [RoutingPolicy(layers, C) for layers in ((HEADS, D), (S, HEADS), (D, CAPPED), (CAPPED, S))]
    check_steps(model, policies, read=(1, 15, 31, 46), change={2: later})


@pytest.mark.parametrize("still", [0, 2])
def test_a_row_without_a_token_stays_as_it_is(still: int) -> None:
    check_steps(model_of("rd"), [RoutingPolicy((S, D), C)], read=(13, 40, 14), still=still)


def test_a_decoder_and_the_forward_pass_go_on_from_one_another() -> None:
    model, policy = model_of("rd"), [RoutingPolicy((HEADS, D), C)]
    x = torch.randint(model.config.vocab_size, (2, 21), device=DEVICE)
    cache = model.new_cache(2)
    parts = [model(x[:, :12], policy, cache=cache).logits]
    decoder = Decoder(model, policy, cache)
    for t in range(12, 21):
        if t % 3 == 0:
            parts.append(model(x[:, t : t + 1], policy, cache=cache).logits)
        else:
            parts.append(decoder.step(x[:, t])[:, None].clone())
    expected = model(x, policy).logits
    assert expected is not None
    torch.testing.assert_close(torch.cat([part for part in parts if part is not None], 1), expected, rtol=0, atol=1e-4)


def test_half_precision() -> None:
    """Routes are given by thresholds that no margin is near, so that both ways keep the same chunks."""
    model = model_of("rsd", Precision.bfloat16)
    check_steps(model, [RoutingPolicy((LayerPolicy(threshold=(-9.0, 9.0)), S, D), C)], tolerance=0.15)


def test_what_is_free_is_never_read() -> None:
    model = model_of("r")
    x = torch.randint(model.config.vocab_size, (2, 34), device=DEVICE)
    policy = [RoutingPolicy((LayerPolicy(threshold=(-9.0, 0.0)),), C)]
    caches = [model.new_cache(2) for _ in range(2)]
    for cache in caches:
        model(x[:, :29], policy, cache=cache)
    for layer in caches[1].layers:
        pages = layer.pages
        assert pages is not None
        layer.pages = pages = pages.grow(60, 20)
        open_ = pages.table.gather(2, pages.kept[..., None]).flatten()
        places = torch.arange(20, device=DEVICE) < pages.kept[..., None]
        for memory in pages[:2]:
            open_kept, kept = memory[open_, :13].clone(), memory[pages.table[places]].clone()
            memory.fill_(torch.nan)
            memory[open_, :13], memory[pages.table[places]] = open_kept, kept
    decoders = [Decoder(model, policy, cache) for cache in caches]
    for t in range(29, 34):
        a, b = (decoder.step(x[:, t]) for decoder in decoders)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_three_launches_for_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, policy = model_of("rsd"), [RoutingPolicy((HEADS, S, D), C)]
    cache = model.new_cache(1)
    decoder = Decoder(model, policy, cache, graph=False)
    decoder.step(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    launched: list[str] = []
    for name in ("decode_prepare_kernel", "decode_memories_kernel", "decode_mix_kernel"):
        kernel = getattr(kernels, name)
        launch = kernel._launch

        def counted(*arguments: Any, _name: str = name, _launch: Any = launch, **constants: Any) -> None:
            launched.append(_name)
            _launch(*arguments, **constants)

        monkeypatch.setattr(kernel, "_launch", counted)
    decoder.step(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert len(launched) == 9


def test_a_step_waits_for_the_device_once_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of("s"), 0
    grow = KeyPages.grow

    def counted(self: KeyPages, pages: int, places: int) -> KeyPages:
        nonlocal asked
        asked += 1
        return grow(self, pages, places)

    monkeypatch.setattr(KeyPages, "grow", counted)
    decoder = Decoder(model, [RoutingPolicy((S,), C)], model.new_cache(1), graph=False)
    for _ in range(2 * C + 1):
        decoder.step(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert 0 < asked <= 3


def arguments(model: RoutedLM, cache: Cache) -> dict[str, Any]:
    """What a decoder passes to ``decode_step`` for its first layer."""
    decoder = Decoder(model, RoutingPolicy((HEADS,), C), cache, graph=False)
    layer, c, compiled = cache.layers[0], model.config, decoder._policy.layer(0)
    x = torch.randn(len(cache.lengths), c.width, device=DEVICE)
    policy = DecodePolicy(compiled.threshold, compiled.cap, compiled.burst, compiled.temperature, compiled.delta_only)
    return {
        "x": x,
        "inputs": x @ decoder._layers[0].inputs.T,
        "weights": decoder._layers[0].weights,
        "state": DecodeState(
            layer.tail,
            layer.total,
            layer.delta,
            layer.pages,
            cache.lengths,
            torch.ones(len(x), dtype=torch.bool, device=DEVICE),
        ),
        "policy": policy,
        "heads": c.heads,
        "softmax_per_head": c.softmax_per_head,
        "chunk_size": C,
        "eps": c.norm_eps,
    }


def test_what_does_not_fit_is_named() -> None:
    model = model_of("r", rope=False)
    given = arguments(model, model.new_cache(2))
    state: DecodeState = given["state"]
    assert decode_step(**given).shape == (2, model.config.heads * model.config.value_dim)
    assert state.total is not None
    assert state.pages is not None
    for change, message in (
        ({"inputs": given["inputs"][:, 1:]}, "inputs"),
        ({"inputs": given["inputs"].double()}, "torch.float64 is not supported"),
        ({"chunk_size": 24}, "chunk_size = 24 is not supported"),
        ({"state": state._replace(tail=state.tail[:, 1:])}, "state.tail has shape"),
        ({"state": state._replace(total=None)}, "state.total is None"),
        ({"state": state._replace(total=state.total.double())}, "state.total is torch.float64"),
        ({"state": state._replace(read=state.read[:1])}, "state.read has shape"),
        ({"state": state._replace(read=state.read.repeat(2)[::2])}, "not contiguous"),
        ({"state": state._replace(pages=state.pages._replace(kept=state.pages.kept.int()))}, "state.pages.kept is"),
        ({"state": state._replace(pages=None, delta=None)}, "neither memory"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_step(**{**given, **change})
    rows = LARGEST_HEADS // model.config.softmax_heads + 1
    wide = {"x": given["x"][:1].expand(rows, -1), "inputs": given["inputs"][:1].expand(rows, -1)}
    tail = state.tail[:1].expand(rows, -1, -1)
    with pytest.raises(ValueError, match="sequences · softmax heads = "):
        decode_step(**{**given, **wide, "state": state._replace(tail=tail)})


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model, policy = model_of("r"), RoutingPolicy((HEADS,), C)
    with pytest.raises(ValueError, match="another shape"):
        Decoder(model, policy, model_of("rs").new_cache(1))
    decoder = Decoder(model, policy, model.new_cache(1))
    with pytest.raises(ValueError, match="the model has 1 layers"):
        decoder.set_policy(RoutingPolicy((HEADS, S), C))


def test_what_is_timed_is_a_step_of_the_size_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(2, 16, 32, 2, 16)
    state = bench.layer_state(shape, 2, 200, 0.5, 0, DEVICE.type)
    assert state.pages is not None
    assert state.delta is not None
    before = state.delta.working.clone()
    kept = state.pages.kept
    assert (kept - 6).abs().max() <= 3
    assert (
        len(state.pages.table[state.pages.table > 0].unique()) == kept.sum() + kept.numel() == len(state.pages.keys) - 1
    )
    y = bench.step_of(shape, 2, DEVICE.type)(state)
    assert y.shape == (2, 64)
    assert y.isfinite().all()
    assert not torch.equal(before, state.delta.working)
    expected = (int(kept.sum()) * 16 + 4 * 8) * 2 * (8 + 16) * 2 + 2 * 4 * 16 * 32 * 4
    assert bench.least_bytes(shape, state) == expected
    if not torch.cuda.is_available():
        assert bench.main([]) == 2
        assert capsys.readouterr().err == "No CUDA device: there is nothing to time\n"
    with pytest.raises(SystemExit):
        bench.main(["--case", "16"])
    assert "'' is not allowed: an integer ≥ 1" in capsys.readouterr().err
