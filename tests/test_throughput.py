"""Timing of whole training steps: what is counted, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from natsl.cli.commands import run_throughput
from natsl.config import ModelConfig
from natsl.errors import UserError
from natsl.model import RoutedLM
from natsl.space.policy import Op, RoutingPolicy
from natsl.throughput import ThroughputConfig, step_flops


def config(**options: object) -> ThroughputConfig:
    model = ModelConfig(layers=[Op.delta, Op.routed])
    small: dict[str, object] = {"batch_size": 1, "tokens": 48, "steps": 2, "device": "cpu", "precision": "float32"}
    return ThroughputConfig(model=model, **{**small, **options})  # type: ignore[arg-type]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_throughput(config(out=str(tmp_path / "new")))
    result = json.loads((tmp_path / "new" / "throughput.json").read_text())
    dense, routed = result["rows"]
    assert [dense["model"], routed["model"]] == ["dense softmax", "routed, budget 0.3"]
    for row in (dense, routed):
        assert row["tokens_per_second"] == pytest.approx(48 / row["step_ms"] * 1e3)
        assert row["share_of_peak"] is row["peak_gib"] is None  # a CPU's are not known
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1] == f"Written: {tmp_path / 'new' / 'throughput.json'}"


def test_products_with_weights_are_counted() -> None:
    """Of softmax layers, without their attention, against what torch counts forward; backward is twice that."""
    model = ModelConfig(layers=[Op.softmax] * 2)
    net, x = RoutedLM(model), torch.zeros(2, 48, dtype=torch.int64)
    policy = RoutingPolicy.all_softmax(model.layers, model.chunk_size)
    routes = [torch.zeros(2, 3, model.heads)] * 2  # the routed op instead of torch's attention, which torch would count
    with FlopCounterMode(display=False) as counter:
        net(x, policy, routes=routes)
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear)) + net.embed.weight.numel()
    assert 3 * linear == 6 * weights * 2 * 48
    none = step_flops(model, 0, 2, 48, 1.0)
    assert step_flops(model, weights, 2, 48, 1.0) == none + 3 * linear
    assert none > 0


def test_what_is_kept_costs() -> None:
    model = ModelConfig(layers=[Op.delta, Op.routed])
    costs = [step_flops(model, 0, 1, 4096, kept) for kept in (0.0, 0.5, 1.0)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])
    assert costs[0] < costs[1]


@pytest.mark.parametrize(
    ("name", "value"), [("budget", 1.5), ("counterfactual_rate", 0.0), ("steps", 0), ("tokens", 0)]
)
def test_mistakes_name_the_value(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        config(**{name: value})


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_only_training_is_compiled(phase: str) -> None:
    assert config(phase="train", compile=True).compile
    with pytest.raises(ValueError, match=f"compile = True is not allowed: phase = {phase} is never compiled"):
        config(phase=phase, compile=True)


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: .*file cannot be written: File exists"):
        run_throughput(config(out=str(tmp_path / "file")))
