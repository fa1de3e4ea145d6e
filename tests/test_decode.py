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
from natsl.kernels.decode import LARGEST_HEADS, DecodeState, decode_step
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
    return [[table], [pages.keys[table].transpose(1, 2)], [pages.values[table].transpose(1, 2)]]


def check_steps(
    model: RoutedLM,
    policies: Sequence[RoutingPolicy],
    *,
    read: Sequence[int] = (13, 46),
    steps: int = 4,
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
    assert kept[1].tolist() == [[1, 1], [3, 3]]
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
            open_kept, kept = memory[open_, :, :13].clone(), memory[pages.table[places]].clone()
            memory.fill_(torch.nan)
            memory[open_, :, :13], memory[pages.table[places]] = open_kept, kept
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
    layer, c, own = cache.layers[0], model.config, decoder._weights.layers[0]
    x, live = torch.randn(len(cache.lengths), c.width, device=DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE)
    return {
        "x": x,
        "inputs": x @ own.inputs.T,
        "weights": own.weights,
        "state": DecodeState(layer.tail, layer.total, layer.delta, layer.pages, cache.lengths, live),
        "policy": decoder._policies[0],
        "heads": c.heads,
        "softmax_per_head": c.softmax_per_head,
        "chunk_size": C,
        "eps": c.norm_eps,
    }


def test_what_does_not_fit_is_named() -> None:
    model = model_of("r")
    arguments_ = arguments(model, model.new_cache(2))
    state, weights, policy = arguments_["state"], arguments_["weights"], arguments_["policy"]
    assert decode_step(**arguments_).shape == (2, model.config.heads * model.config.value_dim)
    for change, message in (
        ({"inputs": arguments_["inputs"][:, 1:]}, "inputs"),
        ({"inputs": arguments_["inputs"][0]}, "inputs has shape"),
        ({"inputs": arguments_["inputs"].double()}, "torch.float64 is not supported"),
        ({"x": arguments_["x"][0]}, "x has shape"),
        ({"heads": 0}, "heads = 0"),
        ({"chunk_size": 24}, "chunk_size = 24 is not supported"),
        ({"state": state._replace(tail=state.tail[:, 1:])}, "state.tail has shape"),
        ({"state": state._replace(total=None)}, "state.total is None"),
        ({"state": state._replace(total=state.total.double())}, "state.total is torch.float64"),
        ({"state": state._replace(read=state.read[:1])}, "state.read has shape"),
        ({"state": state._replace(read=state.read.repeat(2)[::2])}, "not contiguous"),
        ({"state": state._replace(pages=state.pages._replace(kept=state.pages.kept.int()))}, "state.pages.kept is"),
        ({"state": state._replace(pages=None, delta=None)}, "neither memory"),
        ({"policy": policy._replace(threshold=policy.threshold[0])}, "policy.threshold has shape"),
        ({"policy": policy._replace(cap=policy.cap.float())}, "policy.cap is torch.float32"),
        *(
            ({"weights": weights._replace(**{name: None})}, f"weights.{name} is None")
            for name in weights._fields
            if name not in ("conv", "rotation")
        ),
        ({"weights": weights._replace(mix=weights.mix[:1])}, "weights.mix has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_step(**{**arguments_, **change})
    rows = LARGEST_HEADS // model.config.softmax_heads + 1
    wide = {name: arguments_[name][:1].expand(rows, -1) for name in ("x", "inputs")}
    with pytest.raises(ValueError, match="sequences · softmax heads = "):
        decode_step(**{**arguments_, **wide})


def test_inputs_may_have_strides() -> None:
    model = model_of("r")
    results = []
    for turned in (False, True):
        given = arguments(model, model.new_cache(2))
        torch.manual_seed(1)
        given["x"].normal_()
        inputs = torch.randn_like(given["inputs"])
        results.append(decode_step(**{**given, "inputs": inputs.T.contiguous().T if turned else inputs}))
    assert torch.equal(*results)


def test_a_chunk_without_a_page_is_lost_and_harms_no_other() -> None:
    model = model_of("s")
    cache = model.new_cache(2)
    decoder = Decoder(model, RoutingPolicy((S,), C), cache, graph=False)
    layer = cache.layers[0]
    layer.reserve = lambda chunk_size: None  # type: ignore[method-assign]
    assert layer.pages is not None
    assert layer.pages.table.shape[2] == 1
    for _ in range(C + 1):
        decoder.step(torch.zeros(2, dtype=torch.int64, device=DEVICE))
    assert layer.pages.kept.tolist() == [[0, 0], [0, 0]]


def test_mistakes_are_named_and_leave_the_cache_as_it_was() -> None:
    model, policy = model_of("r"), RoutingPolicy((HEADS,), C)
    with pytest.raises(ValueError, match="another shape"):
        Decoder(model, policy, model_of("rs").new_cache(1))
    double = model_of("r").double()
    with pytest.raises(ValueError, match="float64 is not supported"):
        Decoder(double, policy, double.new_cache(1))
    cache = model.new_cache(2)
    decoder = Decoder(model, policy, cache)
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="the model has 1 layers"):
        decoder.set_policy(RoutingPolicy((HEADS, S), C))
    for tokens, live, message in (
        (zeros[:1], None, "tokens must be torch.int64"),
        (zeros.float(), None, "tokens must be torch.int64"),
        (zeros, zeros, "live must be torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.step(tokens, live)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="must lie in"):
            decoder.step(zeros - 1)
    assert cache.lengths.tolist() == [0, 0]
    decoder.step(zeros)
    assert cache.lengths.tolist() == [1, 1]
    cache._usable = False
    with pytest.raises(ValueError, match="unusable"):
        decoder.step(zeros)


def test_weights_are_those_of_when_it_was_made() -> None:
    model, policy = model_of("rsd"), RoutingPolicy((HEADS, S, D), C)
    tokens = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    before = Decoder(model, policy, model.new_cache(1)).step(tokens).clone()
    decoder = Decoder(model, policy, model.new_cache(1))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(1.0)
    assert torch.equal(decoder.step(tokens), before)


def test_steps_in_inference_mode_leave_a_cache_for_other_calls() -> None:
    model, policy = model_of("r"), RoutingPolicy((S,), C)
    tokens = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    cache = model.new_cache(1)
    with torch.inference_mode():
        decoder = Decoder(model, policy, cache)
        for _ in range(C + 1):
            decoder.step(tokens)
    model(tokens[None], policy, cache=cache)
    decoder.step(tokens)


def test_a_graph_is_recorded_anew_only_where_tensors_were_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the graph, which computes when it is replayed."""
    model = model_of("r")
    policies = [RoutingPolicy((LayerPolicy(threshold=(9e9, -9e9)),), C), RoutingPolicy((S,), C)]
    cache, other = model.new_cache(1), model.new_cache(1)
    decoder, plain = Decoder(model, policies[0], cache, graph=True), Decoder(model, policies[0], other, graph=False)
    recorded: list[object] = []

    class Graph:
        def replay(self) -> None:
            decoder._logits = decoder._compute()

    def record() -> Graph:
        recorded.append(cache.layers[0].pages)
        return Graph()

    monkeypatch.setattr(decoder, "_record", record)
    x = torch.randint(model.config.vocab_size, (1, 2 * C + 3), device=DEVICE)
    seen: list[Any] = [cache.layers[0].pages]
    for t in range(2 * C + 3):
        if t == C + 3:  # long after the graph was recorded
            decoder.set_policy(policies[1])
            plain.set_policy(policies[1])
        torch.testing.assert_close(decoder.step(x[:, t]), plain.step(x[:, t]), rtol=0, atol=1e-5)
        pages = cache.layers[0].pages
        if pages is not seen[-1]:
            assert pages is not None
            assert pages.keys is not seen[-1].keys or pages.table is not seen[-1].table
            seen.append(pages)
    assert pages is not None
    assert pages.kept.tolist() == [[1, 2]]
    assert 1 <= len(recorded) <= len(seen)
    anew = len(recorded)
    model(x[:, :1], policies[1], cache=cache)
    model(x[:, :1], policies[1], cache=other)
    torch.testing.assert_close(decoder.step(x[:, 1]), plain.step(x[:, 1]), rtol=0, atol=1e-5)
    assert len(recorded) == anew + 1


def test_chunks_end_again_and_again_while_the_cache_grows() -> None:
    cache, _ = check_steps(model_of("s"), [RoutingPolicy((S,), C)], read=(15, 14), steps=2 * C + 3)
    assert cache.layers[0].pages is not None
    assert cache.layers[0].pages.kept.tolist() == [[3, 3], [3, 3]]


def test_caps_round_up_as_they_do_elsewhere() -> None:
    """.28 · 25 is 7.000000000000001: the seventh chunk is the last one of 25, not the eighth."""
    policy = RoutingPolicy((LayerPolicy(threshold=-99.0, cap=0.28),), C)
    cache, _ = check_steps(model_of("r"), [policy], read=(25 * C - 2,), steps=4)
    assert cache.layers[0].pages is not None
    assert cache.layers[0].pages.kept.tolist() == [[7, 7]]


def test_a_head_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 230 programs about half have a part of the one head that keeps 150 pages: more than are joined at once."""
    monkeypatch.setattr(kernels, "_programs", lambda device: 230)
    model = model_of("r", heads=2)
    check_steps(model, [RoutingPolicy((LayerPolicy(threshold=(9e9, -9e9)),), C)], read=(150 * C - 1,), steps=2)


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
