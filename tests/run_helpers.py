"""A finished run in a folder, made without training: what the commands that read runs are tested on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import checkpoint
from natsl.cli.commands import TrainRunConfig
from natsl.config import ModelConfig, SupernetConfig
from natsl.export import export_point
from natsl.files import to_plain
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks import DataConfig

KINDS = [Op.routed, Op.delta, Op.routed]
BUDGET = RoutingPolicy((LayerPolicy(budget=0.3), LayerPolicy(Op.delta), LayerPolicy(budget=0.6, cap=0.5)), 8)
SOFTMAX = RoutingPolicy.all_softmax(KINDS, 8)


def make_model() -> RoutedLM:
    """A calibrated model whose routers keep some chunks and drop others."""
    torch.manual_seed(1)
    model = RoutedLM(ModelConfig(layers=KINDS, width=16, mlp_width=16, key_dim=8, value_dim=8, chunk_size=8))
    with torch.no_grad():
        for buffer in (model.calibration.by_layer, model.calibration.by_head):
            buffer[[0, 2]] = torch.linspace(-0.02, 0.02, model.calibration.points)
    return model.eval()


def save(run: Run, model: RoutedLM) -> None:
    """Store a supernet that counts as trained to its end."""
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = {"seed": 5, "supernet": to_plain(SupernetConfig(calibration_sequences=16))}
    checkpoint.save(run.supernet, 3, model, optimizer, {"finished": True, **recipe}, keep=1)


def point(name: str, policy: RoutingPolicy) -> dict[str, Any]:
    """A point of a front, as ``front.json`` holds it."""
    plain = {"id": name, "digest": policy.digest(), "policy": policy.to_dict()}
    return plain | {"values": {"recall_error": 0.5}, "measured": {"kept_fraction": 0.3}}


def write_front(run: Run, points: list[dict[str, Any]], knee: str | None, **more: Any) -> None:
    """Write ``front.json``."""
    front = {"run": run.name, "objectives": [{"name": "recall_error", "direction": "minimize"}], "points": points}
    run.write_json(
        run.front_json, front | {"baselines": [], "hypervolume": 0.5, "fingerprint": {}, "knee": knee} | more
    )


def make_run(root: Path) -> Run:
    """The finished run ``r`` on random letters, with a front of two points."""
    text = root / "letters.txt"
    write_letters(text, "abcdefgh ")
    run = Run.open("r", root)
    data = DataConfig(path=str(text), tasks={"bytes": 1.0}, seq_len=44, search_sequences=8, test_sequences=8)
    run.write_config(TrainRunConfig(data=data))
    save(run, make_model())
    write_front(run, [point("t0002", BUDGET), point("t0013", SOFTMAX)], "t0002")
    return run


def make_export(root: Path) -> Path:
    """An export whose layers matter, not verified: a new model just repeats the last token."""
    run, model = make_run(root), make_model()
    with torch.no_grad():
        for block in model.blocks:
            block.get_submodule("mixer").out_proj.weight.mul_(20)  # type: ignore[operator, union-attr]
        for table in (model.calibration.by_layer, model.calibration.by_head):
            table.mul_(5)
    save(run, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("natsl.export.verify", lambda folder: [])
        return export_point(run)


def write_letters(path: Path, letters: str) -> None:
    """A text of random letters, the same every time."""
    path.write_text("".join(random.Random(3).choices(letters, k=4000)))
