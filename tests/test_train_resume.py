"""Trainings that go on: the resumed run equals the unbroken one, another run is refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from natsl import checkpoint
from natsl.config import Precision, Sandwich, SupernetConfig
from natsl.errors import UserError
from natsl.signals import TerminatedError, sigterm_raises
from natsl.train import train_supernet
from tests.oracles import mixer_of, tiny_data
from tests.train_helpers import Killed, Record, assert_equal, kill_at, make_model, recipe


@pytest.mark.parametrize("stops", [[1], [3, 4], [7]], ids=str)
def test_sigterm_stores_the_step_and_the_resumed_run_equals_an_unbroken_one(tmp_path: Path, stops: list[int]) -> None:
    unbroken = make_model()
    train_supernet(unbroken, tiny_data(), recipe(), tmp_path / "unbroken")
    folder = tmp_path / "broken"

    def terminate(record: Record) -> None:
        if record["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    for stop in stops:
        with pytest.raises(TerminatedError), sigterm_raises():
            train_supernet(make_model(), tiny_data(), recipe(), folder, terminate)
        assert max(checkpoint.steps(folder)) == stop
        assert not list(folder.glob(".*"))
    resumed = make_model(init=1)
    tail: list[Record] = []
    train_supernet(resumed, tiny_data(), recipe(), folder, tail.append)
    assert_equal(unbroken, resumed)
    assert [r["step"] for r in tail] == list(range(stops[-1] + 1, 8))


def test_a_training_that_pauses_equals_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = make_model()
    records: list[Record] = []
    train_supernet(unbroken, tiny_data(), recipe(), tmp_path / "unbroken", records.append)
    folder, parts = tmp_path / "paused", list[Record]()
    with monkeypatch.context() as patch:
        patch.setattr("natsl.train.calibrate", None)  # it is not called
        for init, until in enumerate((3, 3, 5)):
            train_supernet(make_model(init=init), tiny_data(), recipe(), folder, parts.append, until)
            assert max(checkpoint.steps(folder)) == until
            assert not load_record(folder, until)["finished"]
    resumed = make_model(init=9)
    train_supernet(resumed, tiny_data(), recipe(), folder, parts.append)
    assert_equal(unbroken, resumed)
    assert [(r["step"], r["lr"], r["loss"]) for r in parts] == [(r["step"], r["lr"], r["loss"]) for r in records]


def load_record(folder: Path, step: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"step-{step:06d}.json").read_text())
    return record


@pytest.mark.parametrize("kind", ["plain", "noise"])
@pytest.mark.parametrize("stops", [[1], [3], [4, 6], [7], [2, 3, 5, 7]], ids=str)
def test_resumed_run_equals_an_unbroken_one(tmp_path: Path, stops: list[int], kind: str) -> None:
    net = SupernetConfig(calibration_points=17, calibration_sequences=8, random_policies=2, route_noise=0.0)
    if kind == "noise":  # everything that draws at random during a step
        net = replace(net, route_noise=0.5, counterfactual_rate=0.5)
    unbroken = make_model()
    records: list[Record] = []
    train_supernet(unbroken, tiny_data(), recipe(net=net), tmp_path / "unbroken", records.append)
    folder = tmp_path / "broken"
    for stop in stops:
        with pytest.raises(Killed):  # once there is a checkpoint, the weights a run starts with no longer matter
            train_supernet(
                make_model(init=len(checkpoint.steps(folder))), tiny_data(), recipe(net=net), folder, kill_at(stop)
            )
    resumed = make_model(init=len(checkpoint.steps(folder)))
    tail: list[Record] = []
    train_supernet(resumed, tiny_data(), recipe(net=net), folder, tail.append)
    assert_equal(unbroken, resumed)
    done = max(0, (stops[-1] - 1) // 2 * 2)
    assert [r["step"] for r in tail] == list(range(done + 1, 8))
    assert [r["loss"] for r in tail] == [r["loss"] for r in records[done:]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "unbroken").iterdir()
    )


def test_resume_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    unbroken = make_model()
    train_supernet(unbroken, tiny_data(), recipe(), tmp_path / "unbroken")
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path / "broken", kill_at(5))
    assert checkpoint.steps(tmp_path / "broken") == [2, 4]
    damaged = tmp_path / "broken" / "step-000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = make_model(init=9)
    tail: list[Record] = []
    with pytest.warns(UserWarning, match="step-000004.safetensors is passed over: checksum error"):
        train_supernet(resumed, tiny_data(), recipe(), tmp_path / "broken", tail.append)
    assert tail[0]["step"] == 3
    assert_equal(unbroken, resumed)


def test_a_finished_run_is_taken_as_it_is(tmp_path: Path) -> None:
    unbroken = make_model()
    train_supernet(unbroken, tiny_data(), recipe(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = make_model(init=5)
    records: list[Record] = []
    train_supernet(again, tiny_data(), recipe(), tmp_path, records.append)
    assert_equal(unbroken, again)
    assert not records
    assert not again.training
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": recipe(seed=1)}, "seed: 0 then, 1 now"),
        ({"recipe": recipe(lr=1e-3, steps=9)}, "train.lr: 0.006 then, 0.001 now, train.steps: 7 then, 9 now"),
        (
            {"recipe": recipe(net=SupernetConfig(budget_max=0.5, calibration_points=17, random_policies=2))},
            "supernet.budget_max: 0.6 then, 0.5",
        ),
        ({"data": tiny_data(tasks={"bytes": 1.0})}, "data: "),
        ({"model": make_model("rd")}, "model.layers: \\['routed', 'routed'\\] then, \\['routed', 'delta'\\] now"),
    ],
    ids=["seed", "train", "supernet", "data", "model"],
)
def test_checkpoints_of_another_run_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path, kill_at(3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = change.get("model", make_model())
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"belong to another run \\({message}"):
        train_supernet(model, change.get("data", tiny_data()), change.get("recipe", recipe()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(torch.equal(t, weights[name]) or t.isnan().all() for name, t in model.state_dict().items())


def make_older(folder: Path, version: int) -> None:
    """Rewrite the checkpoints of a folder as a training of an older version wrote them; version 1 had no name yet."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        bias = [name for name in tensors if name.endswith("mix_bias")]
        states = sum(name.endswith(".exp_avg") for name in tensors)
        dropped = tuple([f"optimizer.{states - 1 - i}." for i in range(len(bias))] + bias)
        if version == 1:
            dropped += ("model.calibration.",)
            tensors["model.calibration"] = torch.zeros(2, 2, 17)
        save_file({name: t for name, t in tensors.items() if not name.startswith(dropped)}, path)
        record = json.loads(path.with_suffix(".json").read_text())
        del record["version"]
        record |= {"version": version} if version > 1 else {}
        path.with_suffix(".json").write_text(json.dumps({**record, "sha256": checkpoint.file_sha256(path)}))


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_training_that_draws_otherwise_is_not_gone_on_with(tmp_path: Path, version: int) -> None:
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path, kill_at(3))
    make_older(tmp_path, version)
    message = rf"draws policies, clamps .* \(training version {version}, now 3\): finish the run"
    with pytest.raises(UserError, match=message):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_training_that_is_finished_is_taken(tmp_path: Path, version: int) -> None:
    trained, again = make_model(), make_model(init=5)
    train_supernet(trained, tiny_data(), recipe(), tmp_path)
    make_older(tmp_path, version)
    records: list[Record] = []
    train_supernet(again, tiny_data(), recipe(), tmp_path, records.append)
    assert not records
    assert torch.equal(again.embed.weight, trained.embed.weight)
    for mixer, other in ((mixer_of(again, i), mixer_of(trained, i)) for i in range(2)):
        assert torch.equal(mixer.mix_proj.weight, other.mix_proj.weight)
        assert other.mix_bias.any()
        assert not mixer.mix_bias.any()
    if version == 1:
        assert again.calibration.levels.tolist() == [i / 16 for i in range(17)]
        assert not again.calibration.by_layer.any()
        assert again.calibration.by_head.isnan().all()
    else:
        assert torch.equal(again.calibration.by_head, trained.calibration.by_head)


def test_a_training_from_before_routers_had_settings_of_their_own(tmp_path: Path) -> None:
    trained = make_model()
    train_supernet(trained, tiny_data(), recipe(), tmp_path)
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        del record["model"]["router_norm"], record["train"]["router_lr"]
        path.write_text(json.dumps(record))
    loaded, _ = checkpoint.load_model(tmp_path)
    assert not loaded.config.router_norm
    assert_equal(trained, loaded)
    again = make_model(init=5)
    train_supernet(again, tiny_data(), recipe(), tmp_path)
    assert_equal(trained, again)
    with pytest.raises(UserError, match=r"model.router_norm: False then, True now"):
        train_supernet(make_model(router_norm=True), tiny_data(), recipe(), tmp_path)
    with pytest.raises(UserError, match=r"train.router_lr: None then, 0.01 now"):
        train_supernet(again, tiny_data(), recipe(router_lr=0.01), tmp_path)


def test_statistics_of_routers_are_resumed(tmp_path: Path) -> None:
    unbroken = make_model(router_norm=True)
    train_supernet(unbroken, tiny_data(), recipe(router_lr=0.01), tmp_path / "unbroken")
    with pytest.raises(Killed):
        train_supernet(make_model(router_norm=True), tiny_data(), recipe(router_lr=0.01), tmp_path / "b", kill_at(5))
    resumed = make_model(init=1, router_norm=True)
    train_supernet(resumed, tiny_data(), recipe(router_lr=0.01), tmp_path / "b")
    assert_equal(unbroken, resumed)
    assert float(mixer_of(resumed, 0).router.updates) == 7  # calibration is not training
    loaded, _ = checkpoint.load_model(tmp_path / "b")
    assert_equal(loaded, resumed)


def test_how_often_to_log_and_how_many_to_keep_may_change(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path, kill_at(5))
    train_supernet(make_model(), tiny_data(), recipe(log_every=3, keep_checkpoints=1), tmp_path)
    assert checkpoint.steps(tmp_path) == [7]


@pytest.mark.parametrize("sandwich", Sandwich, ids=lambda s: s.value)
def test_bfloat16_trains_resumes_and_is_remembered(tmp_path: Path, sandwich: Sandwich) -> None:
    net = SupernetConfig(calibration_points=17, calibration_sequences=8, random_policies=2, sandwich=sandwich)
    options: dict[str, Any] = {"net": net, "precision": Precision.bfloat16, "steps": 8, "batch_size": 8}
    half = Precision.bfloat16
    unbroken = make_model(precision=half)
    records: list[Record] = []
    train_supernet(unbroken, tiny_data(), recipe(**options), tmp_path / "unbroken", records.append)
    assert records[-1]["loss"] < records[0]["loss"]
    with pytest.raises(Killed):
        train_supernet(make_model(precision=half), tiny_data(), recipe(**options), tmp_path / "broken", kill_at(5))
    resumed = make_model(init=1, precision=half)
    train_supernet(resumed, tiny_data(), recipe(**options), tmp_path / "broken")
    assert_equal(unbroken, resumed)
    loaded, _ = checkpoint.load_model(tmp_path / "unbroken")
    assert unbroken.precision is loaded.precision is Precision.bfloat16
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"train.precision: 'bfloat16' then, 'float32' now"):
        train_supernet(
            make_model(), tiny_data(), recipe(**{**options, "precision": Precision.float32}), tmp_path / "unbroken"
        )
    with pytest.raises(ValueError, match=r"train.precision = 'bfloat16' is not allowed: the model computes in float32"):
        train_supernet(make_model(), tiny_data(), recipe(**options), tmp_path / "unbroken")


def test_checkpoints_from_before_there_was_a_precision_are_float32(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path, kill_at(5))
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        del record["train"]["precision"]
        path.write_text(json.dumps(record))
    assert checkpoint.load_model(tmp_path)[0].precision is Precision.float32
    train_supernet(make_model(), tiny_data(), recipe(), tmp_path)
    assert checkpoint.load_model(tmp_path)[1]["finished"] is True
