"""Measuring tables of times: what is measured, what is stored, and the command. No test looks at how long it took."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import latency
from natsl.cli.latency import LatencyConfig, run_latency
from natsl.config import ModelConfig, Precision
from natsl.decode import Decoder
from natsl.errors import UserError
from natsl.latency import Bench, Check, Setting, check_table, filled_cache, measure_table, obtain_table, random_routes
from natsl.space.latency import LatencyTable, Step
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.latency_helpers import MS, decode_ms, made_table, prefill_ms
from tests.oracles import tiny_model

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels run
MODEL = ModelConfig(layers=[Op.routed, Op.delta, Op.softmax], width=16, mlp_width=16, key_dim=8, value_dim=8)
SETTING = Setting(MODEL, Precision.float32, CPU, 2)


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(latency, "FEWEST", 1)


def by_formula(monkeypatch: pytest.MonkeyPatch, rest: Callable[[Step, int], float]) -> list[tuple[Any, ...]]:
    """Benches give the times of formulas instead of measuring; returns what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def milliseconds(bench: Bench, step: Step, tokens: int, kept: latency.Kept) -> float:
        kinds = bench._model.kinds
        ms = MS[step]
        asked.append((tuple(kinds), step, tokens))
        means = [sum(heads) / len(heads) for heads in kept]
        return rest(step, tokens) + sum(ms(kind, f, tokens) for kind, f in zip(kinds, means, strict=True))

    def call_milliseconds(bench: Bench, step: Step, tokens: int, kept: latency.Kept) -> float:
        steps = (step, Step.launch) if step is Step.prefill else (step,)
        return max(milliseconds(bench, part, tokens, kept) for part in steps)

    monkeypatch.setattr(Bench, "milliseconds", milliseconds)
    monkeypatch.setattr(Bench, "call_milliseconds", call_milliseconds)
    return asked


def rest_ms(step: Step, tokens: int) -> float:
    return 0.01 * tokens if step is Step.prefill else 0.5


@pytest.mark.parametrize("most", [8, 2, 1], ids=["all layers", "two of three", "one"])
def test_a_table_is_what_its_layers_take(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether so many layers are timed together as the model has, or fewer."""
    by_formula(monkeypatch, rest_ms)
    monkeypatch.setattr(latency, "LAYERS", most)
    table = measure_table(SETTING, [100])
    assert table.lengths == (16, 32, 64, 100)
    assert set(table.layers) == set(Op)
    policy = RoutingPolicy((LayerPolicy(budget=0.5), LayerPolicy(Op.delta), LayerPolicy(Op.softmax)), 16)
    for step, ms in ((Step.decode, decode_ms), (Step.prefill, prefill_ms)):
        value = table.milliseconds(step, MODEL.layer_shapes(), policy, [0.6, 0.0, 1.0], 48)
        layers = ms(Op.routed, 0.6, 48) + ms(Op.delta, 0.0, 48) + ms(Op.softmax, 1.0, 48)
        launched = 0.5 + 3.0 + 1.0 + 1.0
        expected = layers + rest_ms(step, 48)
        assert value == pytest.approx(expected if step is Step.decode else max(expected, launched))
    # two are timed together at least: one by itself could not be told from the rest
    assert table.rest[Step.decode] == pytest.approx([0.0 if most == 8 else 0.5] * 4)


def test_checks_are_of_what_an_export_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """By formulas that add up, the table is exact whatever the policy."""
    asked = by_formula(monkeypatch, rest_ms)
    table = measure_table(SETTING, [100])
    asked.clear()
    checks = check_table(table, SETTING, [100, 40], 8, seed=0)
    assert len(checks) == 8 * 2 * 2
    assert [check.error for check in checks] == pytest.approx([0.0] * len(checks), abs=1e-9)
    assert {kinds for kinds, _, _ in asked} == {(op, Op.delta, Op.softmax) for op in (Op.routed, Op.delta)}
    assert Check("x", Step.decode, 8, 3.0, 2.0).error == 0.5


def test_what_is_measured_are_times_of_this_model() -> None:
    state = torch.get_rng_state()
    table = measure_table(SETTING, [40])
    assert torch.equal(torch.get_rng_state(), state)
    assert table.made_from["model"]["width"] == 16
    assert table.made_from["batch_size"] == 2
    for grids in table.layers.values():
        assert all(ms > 0 for step in (Step.decode, Step.prefill) for row in grids[step] for ms in row)
    assert all(check.measured_ms > 0 for check in check_table(table, SETTING, [40], 1, seed=0))


@pytest.mark.parametrize(("tokens", "steps"), [(40, 9), (7, 1)], ids=["over a border", "no complete chunk"])
def test_a_filled_cache_is_one_that_can_be_gone_on_from(tokens: int, steps: int) -> None:
    """Both ways of decoding give the same from it, and every head holds what it should."""
    pytest.importorskip("triton")
    model = tiny_model("rsd", chunk_size=16).eval().to(DEVICE)
    heads = model.config.heads
    kept = [[0.5] + [1.0] * (heads - 1), [1.0] * heads, [0.0] * heads]
    cache = filled_cache(model, 2, tokens, kept)
    chunks = tokens // 16
    assert cache.lengths.tolist() == [chunks * 16 + 8] * 2
    pages, delta = cache.layers[0].pages, cache.layers[0].delta
    assert pages is not None
    assert delta is not None
    assert delta.start.tolist() == [8] * 2
    assert pages.kept.float().mean(0).tolist() == pytest.approx([f * chunks for f in kept[0]], abs=0.3)
    used = int(pages.kept.sum()) + pages.kept.numel()
    assert sorted(pages.table[pages.table > 0].tolist()) == list(range(1, used + 1))
    policy = RoutingPolicy.fill(model.kinds, 16, LayerPolicy(threshold=math.inf))
    other = copy.deepcopy(cache)
    decoder = Decoder(model, policy, other)
    for token in torch.randint(model.config.vocab_size, (steps, 2), device=DEVICE):
        expected = model(token[:, None], policy, cache=cache).logits
        torch.testing.assert_close(decoder.step(token), expected[:, 0], rtol=0, atol=1e-3)
    assert cache.layers[0].pages is not None
    assert torch.equal(cache.layers[0].pages.kept, pages.kept)  # nothing is kept by the steps


def test_routes_keep_what_they_should() -> None:
    model = tiny_model("rd", chunk_size=16)
    routes = random_routes(model, 2, 70, [[0.4] * model.config.heads, [0.0] * model.config.heads])
    assert routes[1] is None
    assert routes[0] is not None
    assert routes[0].shape == (2, 5, model.config.heads)
    assert set(routes[0].sum(1).flatten().tolist()) == {2.0}


def test_a_table_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = by_formula(monkeypatch, rest_ms)
    table = obtain_table(SETTING, [64])
    asked.clear()
    assert obtain_table(SETTING, [16, 30]) == table
    assert asked == []
    longer = obtain_table(SETTING, [65])  # which it does not cover
    assert longer.covers(65)
    assert obtain_table(SETTING, [64]) == longer
    asked.clear()
    assert obtain_table(SETTING, [65], fresh=True) == longer
    assert asked != []


def test_a_shorter_table_never_replaces_a_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = by_formula(monkeypatch, rest_ms)
    longer = obtain_table(SETTING, [100])
    asked.clear()
    with pytest.raises(UserError, match=r"tokens = 99 with fresh = true .* up to 100, .* give tokens=100 or more"):
        obtain_table(SETTING, [99], fresh=True)
    assert asked == []
    assert obtain_table(SETTING, [100]) == longer
    wider = obtain_table(SETTING, [8])  # below what it covers
    assert (wider.lengths[0], wider.lengths[-1]) == (8, 100)


@pytest.mark.parametrize(
    "other",
    [
        replace(SETTING, batch_size=1),
        replace(SETTING, precision=Precision.bfloat16),
        replace(SETTING, model=replace(MODEL, width=32)),
    ],
    ids=["batch", "precision", "model"],
)
def test_another_setting_has_another_table(other: Setting) -> None:
    assert latency.table_path(other) != latency.table_path(SETTING)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"\xff", b"[" * 100000], ids=["empty", "cut", "other", "bytes", "deep"]
)
def test_a_damaged_table_is_measured_anew(
    content: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by_formula(monkeypatch, rest_ms)
    table = obtain_table(SETTING, [16])
    path = latency.table_path(SETTING)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert obtain_table(SETTING, [16]) == table
    assert [record.getMessage().partition(" is passed over")[0] for record in caplog.records] == [str(path)]
    assert LatencyTable.from_dict(json.loads(path.read_text())) == table
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_table_of_another_setting_in_its_place_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    by_formula(monkeypatch, rest_ms)
    path = latency.table_path(SETTING)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made_table().to_dict()))
    assert obtain_table(SETTING, [16]).made_from["batch_size"] == 2


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by_formula(monkeypatch, rest_ms)
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert obtain_table(SETTING, [16]).covers(16)
    assert "cannot be stored" in caplog.text


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Bench, "milliseconds", full)
    with pytest.raises(ValueError, match=r"times at batch size 2 cannot be measured on .*, which has not enough"):
        measure_table(SETTING, [16])


def test_the_command_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LatencyConfig(MODEL, tokens=40, policies=1, device="cpu", out=str(tmp_path / "new"))
    run_latency(config)
    record = json.loads((tmp_path / "new" / "latency.json").read_text())
    table = LatencyTable.from_dict(record["table"])
    assert table == obtain_table(Setting(MODEL, Precision.float32, CPU, 1), [40])
    assert [(row["step"], row["tokens"]) for row in record["checks"]] == [
        (step, tokens) for tokens in (16, 40) for step in ("decode", "prefill")
    ]
    out = capsys.readouterr().out
    assert "error: median " in out
    assert out.count("routed decode") == 3


@pytest.mark.parametrize(("name", "value"), [("tokens", 0), ("batch_size", 0), ("policies", -1), ("precision", "half")])
def test_mistakes_name_the_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} = {value!r}"):
        LatencyConfig(**{name: value})
