"""Specialisation: one policy is trained, from a run's weights, and nothing else; what it gained is stored."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl import checkpoint
from natsl.cli.commands import ExportConfig, TrainRunConfig, run_export, run_training
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice
from natsl.cli.generation import GenerateConfig, run_generation
from natsl.cli.main import composed, main
from natsl.config import Precision, SupernetConfig, TrainConfig
from natsl.data import TaskData
from natsl.errors import UserError
from natsl.files import read_config, read_json, write_json
from natsl.load import load_exported
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.search.pipeline import run_search
from natsl.search.specialise import fine_tuning
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.supernet import task_loss
from natsl.tasks import DataConfig
from natsl.tasks.sequences import Batch
from natsl.tracking import TrackingConfig, TrackingMode
from tests.oracles import tiny_config
from tests.run_helpers import point, write_front, write_letters
from tests.train_helpers import Killed

DELTA = LayerPolicy(Op.delta)
POLICIES = {
    "t0000": RoutingPolicy((DELTA, LayerPolicy(budget=0.3)), 8),
    "t0001": RoutingPolicy((DELTA, DELTA), 8),
    "t0002": RoutingPolicy((LayerPolicy(threshold=0.01), LayerPolicy(budget=(1, 0.4))), 8),
}


def training(root: Path, **changes: Any) -> TrainRunConfig:
    """The training of the supernet that is specialised here."""
    data = DataConfig(path=str(root / "letters.txt"), seq_len=64, search_sequences=8, test_sequences=8)
    config = TrainRunConfig(
        name="search",
        root=str(root),
        device="cpu",
        model=tiny_config("rr", associative_init=True, router_norm=True),
        data=data,
        supernet=SupernetConfig(calibration_sequences=8, calibration_points=17, random_policies=2),
        train=TrainConfig(steps=20, batch_size=8, warmup_steps=4, router_lr=3e-3),
        tracking=TrackingConfig(mode=TrackingMode.disabled),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a supernet that has a front."""
    root = tmp_path_factory.mktemp("made")
    write_letters(root / "letters.txt", "abcdefgh ")
    run_training(training(root))
    write_front(Run.open("search", root), [point(name, policy) for name, policy in POLICIES.items()], "t0000")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The same, for a test that may damage it; the text stays where it was."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def fine(root: Path, pick: str | None = None, **changes: Any) -> TrainRunConfig:
    """A short specialisation as the command gets it if only these options are given."""
    settings: dict[str, Any] = {"name": "fine", "train": TrainConfig(steps=7, checkpoint_every=2, log_every=1)}
    tracking = TrackingConfig(mode=TrackingMode.disabled)
    config = TrainRunConfig(root=str(root), specialise="search", pick=pick, device="cpu", tracking=tracking)
    return replace(config, **{**settings, **changes})


def weights(root: Path, name: str) -> dict[str, Tensor]:
    return checkpoint.load_model(root / name / "supernet")[0].state_dict()


def mean_loss(root: Path, name: str, policy: RoutingPolicy) -> float:
    """Over batches of training, with the model's own thresholds."""
    model, _ = checkpoint.load_model(root / name / "supernet")
    data = TaskData(training(root.parent / "made").data, letters(root), 384)
    total = 0.0
    for step in range(20, 26):
        batch = data.train_batch(16, 0, step)
        with torch.no_grad():
            output = model(batch.tokens, policy, targets=batch.targets)
        total += float(task_loss(output.loss, output.right, batch).total)
    return total


def letters(root: Path) -> Any:
    from natsl.data import load_text

    return load_text(read_config(root / "search" / "config.yaml")["data"]["path"])


def changed(root: Path, name: str = "fine") -> set[str]:
    """Names of weights and buffers that are not those of the supernet."""
    before, after = weights(root, "search"), weights(root, name)
    return {key for key in before if not key.startswith("calibration.") and not torch.equal(before[key], after[key])}


def test_the_loss_of_the_policy_falls_and_the_supernet_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (root / "search").rglob("*") if path.is_file()}
    run_training(fine(root, train=TrainConfig(steps=40, lr=3e-3, checkpoint_every=50)))
    assert {path.name: path.read_bytes() for path in (root / "search").rglob("*") if path.is_file()} == before
    assert mean_loss(root, "fine", POLICIES["t0000"]) < mean_loss(root, "search", POLICIES["t0000"]) - 0.3
    records = [json.loads(line) for line in (root / "fine" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 40
    assert records[-1]["loss"] == records[-1]["loss_policy"]
    assert records[-1]["lr"] == 0
    assert not any("loss_softmax" in record for record in records)
    shown = capsys.readouterr().out
    assert "t0000 (D .3) of run 'search', specialised in 40 steps at a learning rate of 0.003" in shown
    assert "natsl export run=fine root=" in shown


SOFTMAX_ONLY = {"q_norm.weight", "k_norm.weight", "softmax_norm", "mix_proj.weight", "mix_proj.bias", "mix_bias"}
ROUTER = {"router.weight", "router.bias", "router.mean", "router.variance", "router.updates"}


@pytest.mark.parametrize(
    ("pick", "kept"),
    [
        ("t0000", {0: SOFTMAX_ONLY | ROUTER, 1: set()}),
        ("t0001", {0: SOFTMAX_ONLY | ROUTER, 1: SOFTMAX_ONLY | ROUTER}),
        ("t0002", {0: ROUTER, 1: set()}),
    ],
    ids=["delta and a budget", "delta", "a threshold and a budget per head"],
)
def test_what_the_policy_does_not_use_stays_bit_for_bit(root: Path, pick: str, kept: dict[int, set[str]]) -> None:
    run_training(fine(root, pick, train=TrainConfig(steps=3, lr=3e-3)))
    names = {name for name in weights(root, "search") if not name.startswith("calibration.")}
    assert changed(root) == names - {f"blocks.{i}.mixer.{name}" for i, own in kept.items() for name in own}


def test_only_the_policy_is_run_on_batches_after_those_of_the_supernet(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, batches = [], []
    backward, train_batch = sys.modules["natsl.train"].sandwich_backward, TaskData.train_batch

    def policies(model: Any, batch: Batch, policies: Any, config: SupernetConfig) -> Any:
        seen.append((len(batch), policies, config.route_noise))
        return backward(model, batch, policies, config)

    def batch(self: TaskData, count: int, seed: int, step: int) -> Batch:
        batches.append((count, seed, step))
        return train_batch(self, count, seed, step)

    monkeypatch.setattr("natsl.train.sandwich_backward", policies)
    monkeypatch.setattr(TaskData, "train_batch", batch)
    run_training(fine(root, seed=3))
    assert seen == [(8, [POLICIES["t0000"]], 0.0)] * 7
    assert batches == [(8, 3, 20 + step) for step in range(7)]


@pytest.mark.parametrize("stop", [1, 4, 7], ids=str)
def test_resumed_it_equals_an_unbroken_one(root: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    run_training(fine(root, name="unbroken"))
    update = sys.modules["natsl.train"].Progress.update

    def kill(self: Any, done: int, text: str = "") -> None:
        update(self, done, text)
        if done == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("natsl.train.Progress.update", kill)
        with pytest.raises(Killed):
            run_training(fine(root))
    stored = read_json(root / "fine" / "specialise.json")
    assert stored["digest"] == POLICIES["t0000"].digest()
    assert "test" not in stored
    if stop > 1:
        with pytest.raises(UserError, match="the specialisation 'fine' is not finished: resume it first"):
            evaluate_choice(EvaluateRunConfig("fine", str(root), device="cpu"))
        with pytest.raises(UserError, match="not calibrated"):
            evaluate_choice(EvaluateRunConfig("fine", str(root), budget=0.3, device="cpu"))
    run_training(fine(root))
    one, other = weights(root, "unbroken"), weights(root, "fine")
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [read_json(root / name / "specialise.json") for name in ("unbroken", "fine")]
    same = {name: reports[0][name] for name in ("date", "checkpoint")}
    assert reports[0] == {**reports[1], **same}


def test_a_finished_one_is_measured_if_it_was_not_and_then_left(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("natsl.search.specialise.compare", killed)
        with pytest.raises(Killed):
            run_training(fine(root))
    run_training(fine(root))
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (root / "fine" / "supernet").iterdir()}
    report = (root / "fine" / "specialise.json").stat().st_mtime_ns
    monkeypatch.setattr("natsl.search.specialise.compare", killed)
    run_training(fine(root, "t0000"))  # the knee by its name
    assert capsys.readouterr().out == first
    assert (root / "fine" / "specialise.json").stat().st_mtime_ns == report
    assert {path: path.stat().st_mtime_ns for path in (root / "fine" / "supernet").iterdir()} == before


def test_the_report_has_the_policy_before_and_after(root: Path) -> None:
    run_training(fine(root, train=TrainConfig(steps=20, lr=3e-3)))
    report = read_json(root / "fine" / "specialise.json")
    assert (report["run"], report["pick"], report["policy_file"]) == ("search", "t0000", None)
    assert report["policy"] == POLICIES["t0000"].to_dict()
    for name, key in (("search", "supernet"), ("fine", "checkpoint")):
        assert report[key]["sha256"] == checkpoint.load_model(root / name / "supernet")[1]["sha256"]
    for split in ("search", "test"):
        part = report[split]
        assert part["sequences"] == {"mqar": 8}
        for row, name in (("before", "search"), ("after", "fine")):
            measured = evaluate_choice(EvaluateRunConfig(name, str(root), split=split, device="cpu"))
            quality = part[row].pop("quality")
            assert part[row] == json.loads(json.dumps(measured.to_dict()))
            assert quality["mqar"] == pytest.approx(measured.errors["recall_error"])
            assert quality["text"] == pytest.approx(measured.val_loss)
        last = part.get("equal", part["after"])
        for task, metric in (("mqar", "recall_error"), ("text", "val_loss")):
            gain = part["gain"][task]
            assert gain["metric"] == metric
            assert gain["gain"] == pytest.approx(part["before"][metric] - last[metric], abs=1e-6)
    assert report["test"]["gain"]["text"]["gain"] > 0
    if report["equal_policy"] is not None:
        path = root / "equal.json"
        write_json(path, report["equal_policy"])
        measured = evaluate_choice(EvaluateRunConfig("fine", str(root), policy=str(path), split="search", device="cpu"))
        assert measured.kept_fraction == report["search"]["equal"]["kept_fraction"]
        assert measured.kept_fraction == pytest.approx(report["search"]["before"]["kept_fraction"], rel=0.02)


def test_other_commands_take_its_policy(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(fine(root, "t0002"))
    run_export(ExportConfig("fine", str(root)))  # verified in a fresh process
    policy = POLICIES["t0002"]
    folder = root / "fine" / "export" / f"policy-{policy.digest()[:8]}"
    model, stored = load_exported(folder)
    assert stored == policy
    expected = weights(root, "fine")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    provenance = read_json(folder / "provenance.json")
    assert provenance["specialised"]["run"] == "search"
    assert "pick" not in provenance
    drawn = []
    for run, export, pick in (("fine", None, None), (None, str(folder), None), ("fine", None, "knee")):
        capsys.readouterr()
        run_generation(GenerateConfig(run, str(root), pick, export, max_new_tokens=5, device="cpu"))
        drawn.append(capsys.readouterr().out)
    assert len(set(drawn)) == 1
    with pytest.raises(UserError, match="pick = 't0001': run 'fine' is specialised for one policy: leave pick out"):
        evaluate_choice(EvaluateRunConfig("fine", str(root), pick="t0001", device="cpu"))


def test_an_export_says_what_its_weights_were_specialised_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    run_training(fine(root, "t0001"))
    (tmp_path / "mine.json").write_text(POLICIES["t0000"].to_json())
    run_export(ExportConfig("fine", str(root), name="own"))
    run_export(ExportConfig("fine", str(root), name="other", policy=str(tmp_path / "mine.json")))
    run_export(ExportConfig("search", str(root), name="supernet"))
    digest = POLICIES["t0001"].digest()
    for name, which in (("own", "the policy below"), ("other", f"another policy than the one below ({digest})")):
        folder = root / "fine" / "export" / name
        special = read_json(folder / "provenance.json")["specialised"]
        assert (special["run"], special["pick"], special["digest"]) == ("search", "t0001", digest)
        card = (folder / "README.md").read_text()
        assert f"**Specialised**: the weights of run search, t0001, trained on for {which} alone." in card
        assert "- specialised from: the weights of run search, t0001\n" in card
    card = (root / "search" / "export" / "supernet" / "README.md").read_text()
    assert "pecialised" not in card


def test_what_is_specialised_again_goes_on_with_other_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    train_batch = TaskData.train_batch

    def noted(self: TaskData, count: int, seed: int, step: int) -> Batch:
        seen.append(step)
        return train_batch(self, count, seed, step)

    run_training(fine(root))
    monkeypatch.setattr(TaskData, "train_batch", noted)
    run_training(fine(root, name="finer", specialise="fine"))
    assert seen == list(range(27, 34)), "20 of the supernet and 7 of the first specialisation came before"
    seen.clear()
    run_training(fine(root, name="finest", specialise="finer"))
    assert seen == list(range(34, 41))


def test_a_specialisation_is_not_searched(root: Path) -> None:
    run_training(fine(root))
    config = SearchRunConfig(name="second", root=str(root), supernet_from="fine", device="cpu")
    with pytest.raises(UserError, match=r"supernet_from = 'fine' is a specialisation: its weights are for one policy"):
        run_search(config)
    assert not (root / "second").exists()


def test_a_policy_file_and_a_training_without_a_front(root: Path, tmp_path: Path) -> None:
    (root / "search" / "front.json").unlink()
    (tmp_path / "mine.json").write_text(POLICIES["t0001"].to_json())
    with pytest.raises(UserError, match=r"run 'search' has no front.json: finish the search first"):
        run_training(fine(root))
    run_training(fine(root, policy=str(tmp_path / "mine.json")))
    report = read_json(root / "fine" / "specialise.json")
    assert (report["pick"], report["policy_file"], report["policy"]) == (
        None,
        "mine.json",
        POLICIES["t0001"].to_dict(),
    )


REFUSED = {
    "run": ({"specialise": "nowhere"}, "there is no run 'nowhere' in .*; known: search"),
    "pick": ({"pick": "t9"}, "pick = 't9' is not on the front: pick knee or one of t0000, t0001, t0002"),
    "model": ({"model": tiny_config("rr", width=32)}, r"model.width = 32, but run 'search' has 16: leave it out"),
    "supernet": ({"supernet": SupernetConfig(budget_max=0.5)}, "supernet.budget_max = 0.5, but run 'search' has 0.6"),
    "length": ({"data": DataConfig(seq_len=96)}, "data.seq_len = 96, but run 'search' has 64"),
    "tasks": (
        {"data": DataConfig(tasks={"bytes": 1})},
        r"data.tasks = {'bytes': 1}, but run 'search' has {'mqar': 1.0}",
    ),
    "precision": (
        {"train": TrainConfig(precision=Precision.bfloat16)},
        "train.precision = 'bfloat16', but run 'search' has 'float32'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_the_run_is_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_training(fine(root, **changes))
    assert "\n" not in str(caught.value)
    assert not (root / "fine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pick": "knee"}, "pick = 'knee' is not allowed: it goes with specialise=<run>"),
        ({"policy": "p.json"}, "policy = 'p.json' is not allowed: it goes with specialise=<run>"),
        ({"specialise": "r", "pick": "t1", "policy": "p.json"}, r"pick, policy = \('t1', 'p.json'\) .* only one"),
        ({"specialise": "../r"}, r"specialise = '\.\./r' is not allowed: 1 to 64 letters"),
        ({"specialise": "train"}, "name = 'train' is not allowed: that is the run to specialise"),
    ],
    ids=["pick", "policy", "both", "outside", "itself"],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainRunConfig(**options)


def test_a_name_is_for_one_specialisation(root: Path) -> None:
    run_training(fine(root))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    mine = r"name = 'fine' is specialised for the policy D \.3 \(\w+\), not for D D \(\w+\): choose another name"
    for config, message in (
        (fine(root, "t0001"), mine),
        (fine(root, train=TrainConfig(steps=8)), "train.steps: 7 then, 8 now"),
        (fine(root, seed=1), "seed: 0 then, 1 now"),
        (training(root, name="fine"), "specialise: 'search' then, None now"),
        (fine(root, specialise="fine", name="search"), "specialise: None then, 'fine' now"),
    ):
        with pytest.raises(UserError, match=message):
            run_training(config)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_checkpoints_of_a_specialisation_are_of_no_other_training(root: Path) -> None:
    run_training(fine(root))
    from natsl.train import TrainRecipe, train_supernet

    record = checkpoint.load_model(root / "fine" / "supernet")[1]
    config = read_config(root / "fine" / "config.yaml")
    recipe = TrainRecipe(TrainConfig(**record["train"]), SupernetConfig(**record["supernet"]), 0)
    data = TaskData(
        DataConfig(path=config["data"]["path"], seq_len=64, search_sequences=8, test_sequences=8), letters(root), 384
    )
    model = checkpoint.load_model(root / "search" / "supernet")[0]
    with pytest.raises(UserError, match=r"belong to another run .*specialised: {.* then, None now"):
        train_supernet(model, data, recipe, root / "fine" / "supernet")


def test_a_supernet_that_is_not_finished_or_another_one(root: Path) -> None:
    (stored,) = (root / "search" / "supernet").glob("*000020.json")
    record = read_json(stored)
    write_json(stored, {**record, "finished": False})
    with pytest.raises(UserError, match="the supernet of run 'search' is not trained to its end: resume that run"):
        run_training(fine(root))
    write_json(stored, record)
    run_training(fine(root))
    model, optimizer = checkpoint.load_model(root / "search" / "supernet")[0], torch.optim.AdamW([torch.zeros(1)])
    with torch.no_grad():
        model.embed.weight.mul_(1.1)
    meta = {name: value for name, value in record.items() if name not in ("format", "step", "sha256", "model")}
    checkpoint.save(root / "search" / "supernet", 20, model, optimizer, meta, 1)
    with pytest.raises(UserError, match="the supernet of run 'search' is no longer the one that 'fine' was begun with"):
        run_training(fine(root))


def test_the_text_must_be_that_of_the_run(root: Path, tmp_path: Path) -> None:
    text = Path(read_config(root / "search" / "config.yaml")["data"]["path"])
    (tmp_path / "moved.txt").write_bytes(text.read_bytes())
    write_letters(tmp_path / "other.txt", "0123456789")
    moved = DataConfig(path=str(tmp_path / "other.txt"))
    with pytest.raises(UserError, match=r"the text is not what run 'search' was trained on: .*other\.txt now"):
        run_training(fine(root, data=moved))
    record = read_json(root / "search" / "text.json")
    write_json(root / "search" / "text.json", {**record, "trained": {**record["trained"], "text": "other"}})
    with pytest.raises(UserError, match="was trained on other text than the run was judged on"):
        run_training(fine(root))


def test_a_search_is_left_alone(root: Path) -> None:
    Run.open("fine", root).study_db.write_bytes(b"x")
    with pytest.raises(UserError, match="name = 'fine' is a search: choose another name"):
        run_training(fine(root))
    assert not (root / "fine" / "specialise.json").exists()


def test_the_schedule_of_a_fine_tuning() -> None:
    theirs = TrainConfig(steps=300, lr=4e-3, router_lr=1e-2, batch_size=16, beta2=0.9)
    made = fine_tuning(theirs, {})
    assert (made.steps, made.warmup_steps, made.lr_final) == (150, 15, 0.0)
    assert [made.lr, made.router_lr] == pytest.approx([1.2e-3, 3e-3])
    assert (made.batch_size, made.beta2) == (16, 0.9)
    given = fine_tuning(theirs, {"steps": 40, "lr": 4e-3, "batch_size": 5})
    assert (given.steps, given.warmup_steps, given.lr, given.router_lr, given.batch_size) == (40, 4, 4e-3, 1e-2, 5)
    assert fine_tuning(replace(theirs, router_lr=None), {}).router_lr is None


Natsl = Callable[..., str]


@pytest.fixture
def natsl(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Natsl:
    """``natsl train name=fine specialise=search`` in this process, with more options; returns its line of error."""
    quiet = ("device=cpu", "tracking.mode=disabled", "train.steps=2")

    def call(*options: str) -> str:
        arguments = ["name=fine", "specialise=search", f"root={root}", *quiet, *options]
        monkeypatch.setattr(sys, "argv", ["natsl", "train", *arguments])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        try:
            main()
        except SystemExit:
            return capsys.readouterr().err.strip().splitlines()[-1]
        return ""

    return call


def test_what_was_typed_counts_though_it_is_the_default(natsl: Natsl, root: Path) -> None:
    assert natsl("model.width=64") == "error: model.width = 64, but run 'search' has 16: leave it out"
    assert "but run 'search' has" in natsl("model=tiny")
    assert natsl("train.lr=6e-3", "train.log_every=10") == ""
    stored = read_config(root / "fine" / "config.yaml")
    assert (stored["train"]["lr"], stored["train"]["router_lr"], stored["train"]["batch_size"]) == (6e-3, 3e-3, 8)
    assert stored["model"]["width"] == 16
    assert stored["data"]["seq_len"] == 64


def test_what_the_default_preset_sets_was_given_by_nobody(natsl: Natsl, root: Path, tmp_path: Path) -> None:
    run_training(training(root, name="plain", model=tiny_config("rr")))
    (tmp_path / "p.json").write_text(POLICIES["t0000"].to_json())
    assert composed("train", TrainRunConfig).model.associative_init
    assert natsl("specialise=plain", f"policy={tmp_path}/p.json") == ""
    assert not checkpoint.load_model(root / "fine" / "supernet")[0].config.associative_init
