"""The command: variants and what is refused, jobs that go on, kept results, processes and devices."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import checkpoint
from natsl.cli.main import run_verb
from natsl.config import TRAINING_VERSION, Counterfactual, SupernetConfig
from natsl.data import load_text
from natsl.errors import UserError
from natsl.files import write_json
from natsl.run import Run
from natsl.search.ablation import command, pool
from natsl.search.ablation.command import check_data, run_ablation, visible_devices
from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.job import Job, run_job
from natsl.search.ablation.pool import run_jobs, stored_results
from natsl.search.ablation.record import FORMAT
from natsl.space.policy import Op
from natsl.train import Trainer
from tests.ablation_helpers import Variants, job, small
from tests.ablation_workers import be_killed, meet, note_device
from tests.search_helpers import is_png


def test_variants_change_options_of_every_section() -> None:
    variants: Variants = {
        "base": {},
        "other": {
            "model": {"width": 24, "layers": ["routed", "delta"], "rope": True},
            "data": {"tasks": {"bytes": 1}, "mqar": {"pair_share": 0.125}},
            "supernet": {"counterfactual": "none", "route_noise": 1},
            "train": {"lr": 0.001},
        },
    }
    c = small(Path("unused"), variants=variants)
    base, other = c.variant("base"), c.variant("other")
    assert (base.model, base.data, base.supernet, base.train) == (c.model, c.data, c.supernet, c.train)
    assert other.model == replace(c.model, width=24, layers=[Op.routed, Op.delta], rope=True)
    assert other.data == replace(c.data, tasks={"bytes": 1.0}, mqar=replace(c.data.mqar, pair_share=0.125))
    assert other.supernet == replace(c.supernet, counterfactual=Counterfactual.none, route_noise=1.0)
    assert other.train == replace(c.train, lr=0.001)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"counterfactual": "none"},
            r"variants.x: counterfactual = 'none' is not in a section: write supernet: {counterfactual: 'none'}",
        ),
        ({"modle": {}}, r"variants.x: section = 'modle' is not allowed: .* model, data, supernet, train"),
        ({"supernet": {"noise": 1}}, r"variants.x: unknown option supernet.noise = 1: the options are .*route_noise"),
        ({"data": {"mqar": {"share": 1}}}, r"variants.x: unknown option data.mqar.share = 1: .*pair_share"),
        ({"supernet": None}, r"variants.x: supernet = None is not allowed: a section is a mapping with .*route_noise"),
        ({"data": {"mqar": 3}}, r"variants.x: data.mqar = 3 is not allowed: a section is a mapping with .*pair_share"),
        ({"model": {"width": "broad"}}, r"variants.x: model.width = 'broad' is not allowed: .*broad.* to Integer"),
        ({"supernet": {"detach_router": "maybe"}}, r"variants.x: supernet.detach_router = 'maybe' is not .* bool"),
        ({"supernet": {"counterfactual": "all"}}, r"variants.x: supernet.counterfactual = 'all' is not .*insertion"),
        ({"model": {"width": 0}}, r"variants.x: model.width = 0 is not allowed: it must be an integer ≥ 1"),
        ({"data": {"tasks": {"copy": 1}}}, r"variants.x: data.tasks = 'copy' is not allowed: the tasks are bytes"),
        ({"supernet": {"random_policies": 3}}, r"variants.x: train.batch_size = 4 is not .* multiple of the 5"),
        ({"model": {"chunk_size": 128}}, r"variants.x: data.seq_len = 64 is not .* chunk_size = 128"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_variants_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(Path("unused"), variants={"base": {}, "x": overrides})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, r"seeds = \[\] is not allowed: at least one is needed"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] is not allowed: each must be there once"),
        ({"budgets": []}, r"budgets = \[\] is not allowed: at least one is needed"),
        ({"budgets": [0.1, 1.0]}, r"budgets = 1.0 is not allowed: each budget must lie in \(0, 1\)"),
        ({"lengths": [0]}, r"lengths\[0\] = 0 is not allowed: it must be an integer ≥ 1"),
        ({"workers": 0}, r"workers = 0 is not allowed"),
        ({"batch_size": 0}, r"batch_size = 0 is not allowed"),
        ({"random_draws": 0}, r"random_draws = 0 is not allowed"),
        ({"headroom_sequences": -1}, r"headroom_sequences = -1 is not allowed"),
        ({"variants": {}}, r"variants = {} is not allowed: at least one is needed, such as {base: {}}"),
        ({"name": "../a"}, r"name = '../a' is not allowed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small(Path("unused")), **options)


@pytest.mark.parametrize(
    ("data", "lengths", "message"),
    [
        ({"seq_len": 72}, [1], r"variants.x: data.seq_len = 72 is not allowed: mqar needs a multiple of"),
        ({"keys": 99}, [1], r"variants.x: model.vocab_size = 384 is not allowed: task mqar needs at least 419"),
        ({"seq_len": 192}, [1, 40], r"variants.x, lengths = 40: data.path = .* is too short: .* length = 7680 needs"),
        ({"path": "/nowhere"}, [1], r"variants.x: data.path = '/nowhere'"),
    ],
    ids=["task", "vocabulary", "length", "path"],
)
def test_data_that_do_not_fit_are_refused_before_there_is_a_run(
    data: dict[str, Any], lengths: list[int], message: str, tmp_path: Path, text: str
) -> None:
    c = replace(small(tmp_path / "runs", text, {"base": {}, "x": {"data": data}}), lengths=lengths)
    with pytest.raises(UserError, match=message):
        run_ablation(c)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"variants.base: data.tasks = {'mqar': 1.0} is not allowed: headroom_sequences needs the task bytes"),
        (
            {"tasks": {"bytes": 1.0}, "seq_len": 70},
            r"variants.base: data.seq_len = 70 is not allowed: with headroom_sequences it must be a multiple of .* = 8",
        ),
        (
            {"tasks": {"bytes": 1.0}, "seq_len": 8},
            r"variants.base: data.seq_len = 8 is not allowed: with headroom_sequences it must be at least two chunks",
        ),
        (
            {"tasks": {"bytes": 1.0}, "test_sequences": 1},
            r"variants.base: data.test_sequences = 1 is not allowed: with headroom_sequences it must be ≥ 2",
        ),
    ],
    ids=["task", "length", "one chunk", "sequences"],
)
def test_headroom_needs_text_in_whole_chunks(data: dict[str, Any], message: str, tmp_path: Path, text: str) -> None:
    c = small(tmp_path / "runs", text)
    c = replace(c, headroom_sequences=4, data=replace(c.data, **data))
    with pytest.raises(UserError, match=message):
        run_ablation(c)


def test_every_variant_has_its_own_text(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} and {i * i}\n" for i in range(3000)))
    texts = check_data(small(tmp_path, text, {"base": {}, "x": {"data": {"path": str(other)}}}))
    assert texts == {"base": load_text(text).fingerprint, "x": load_text(str(other)).fingerprint}
    assert texts["base"] != texts["x"]


def test_an_ablation_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[AblationConfig] = []
    monkeypatch.setattr(command, "run_ablation", configs.append)
    run_verb("ablation", [f"root={tmp_path}"])
    run_verb("ablation", ["variants={base: {}, x: {data: {mqar: {pair_share: 0.25}}}}", "variants.x.train.steps=7"])
    run_verb("ablation", ["experiment=routing", "device=cpu"])
    run_verb("ablation", ["experiment=recall"])
    preset, own, routing, recall = configs
    assert list(routing.variant("neither").data.tasks.items()) == [("mqar", 0.0), ("bytes", 1.0)]
    assert [routing.variant(name).train.router_lr for name in routing.variants] == [
        None,
        0.01,
        None,
        0.01,
        0.01,
        None,
        0.01,
    ]
    default = SupernetConfig()
    for config in (routing, recall):
        before, now = (config.variant(name).supernet for name in ("neither", "policies, noise"))
        assert (before.random_policies, before.route_noise) == (2, 0.0)
        assert (now.random_policies, now.route_noise) == (default.random_policies, default.route_noise)
    assert preset.variant("chosen only").supernet.counterfactual is Counterfactual.none
    assert len(preset.variants) == 6
    assert (own.variant("x").data.mqar.pair_share, own.variant("x").train.steps) == (0.25, 7)
    assert (own.variant("base").data.mqar.pair_share, own.variant("base").train.steps) == (0.125, 260)


def test_everything_is_written_and_results_are_kept(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = replace(small(tmp_path, text, {"base": {}, "text": {"data": {"tasks": {"bytes": 1}}}}), lengths=[2])
    run_ablation(c)
    (first, notes), folder = capsys.readouterr(), tmp_path / "a"
    assert f"note: tables and pictures are in {folder}: ablation.md" in notes
    results = json.loads((folder / "ablation.json").read_text())
    assert [(r["variant"], r["seed"]) for r in results] == [("base", 0), ("text", 0)]
    assert [[list(at["anchors"]) for at in r["lengths"]] for r in results] == [[["mqar"]] * 2, [["bytes"]] * 2]
    assert [at["tokens"] for at in results[1]["lengths"]] == [64, 128]
    assert (folder / "ablation.md").read_text() == first
    titles = [line for line in first.splitlines() if line.startswith("## ")]
    assert titles == [
        "## mqar at budget 0.25: recall error",
        "## bytes at budget 0.25: loss on held-out text",
        "## mqar at budget 0.25, 2 × the length: recall error",
        "## bytes at budget 0.25, 2 × the length: loss on held-out text",
    ]
    assert all(is_png((folder / name).read_bytes()) for name in ("share.png", "loss.png"))
    assert sorted(path.name for path in folder.glob("jobs/*/[!.]*")) == ["result.json"] * 2
    assert Run.names(tmp_path) == ["a"]

    def refuse(job: Job, device: str) -> None:
        raise AssertionError("a job that is done was run again")

    monkeypatch.setattr(pool, "run_job", refuse)
    run_ablation(c)
    assert capsys.readouterr().out == first


def test_a_job_that_was_cut_off_goes_on_from_its_checkpoint(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = small(tmp_path, text)
    c.train = replace(c.train, steps=3, checkpoint_every=1)
    straight = run_job(job(replace(c, name="straight")), "cpu")
    step, steps = Trainer.step, []

    def die(self: Trainer, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    def count(self: Trainer, number: int) -> Any:
        steps.append(number)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", die)
    with pytest.raises(KeyboardInterrupt):
        run_job(job(c), "cpu")
    folder = job(c).folder
    assert checkpoint.steps(folder / "supernet") == [1, 2]
    assert not job(c).result.exists()
    monkeypatch.setattr(Trainer, "step", count)
    assert run_job(job(c), "cpu") == straight
    assert steps == [2]
    assert json.loads(job(c).result.read_text()) == straight
    assert not (folder / "supernet").exists()


def test_a_supernet_that_is_kept_is_judged_again_without_training(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = replace(small(tmp_path, text), keep_supernets=True)
    run_job(job(c), "cpu")
    assert checkpoint.steps(job(c).folder / "supernet") == [1]

    def refuse(self: Trainer, number: int) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(Trainer, "step", refuse)
    again = run_job(job(replace(c, budgets=[0.5])), "cpu")
    assert [policy["budget"] for policy in again["lengths"][0]["policies"]] == [0.5, 0.5]


def test_checkpoints_of_another_variant_are_refused(tmp_path: Path, text: str) -> None:
    c = replace(small(tmp_path, text), keep_supernets=True)
    run_job(job(c), "cpu")
    other = replace(c, variants={"base": {"train": {"lr": 0.5}}})
    with pytest.raises(UserError, match=r"belong to another run \(train.lr: 0.006 then, 0.5 now\)"):
        run_job(job(other), "cpu")


def test_two_processes_do_not_share_a_job(tmp_path: Path, text: str) -> None:
    own = job(small(tmp_path, text))
    own.folder.mkdir(parents=True)
    with Run(own.folder).lock(), pytest.raises(UserError, match="the run '00-0' is in use by another process"):
        run_job(own, "cpu")


def stored(own: Job, version: int = TRAINING_VERSION) -> dict[str, Any]:
    """Write a result of a job as it is stored, and return it."""
    plain: dict[str, Any] = {"format": FORMAT, "variant": own.variant, "seed": own.seed}
    plain |= {"fingerprint": own.fingerprint(), "text": own.text}
    own.folder.mkdir(parents=True, exist_ok=True)
    write_json(own.result, plain | {"version": version})
    return plain | {"version": version}


def test_a_result_is_used_only_where_everything_matches(tmp_path: Path) -> None:
    c = small(tmp_path)
    own = job(c)
    kept = stored(own)
    assert stored_results([own]) == ([kept], [])
    free = replace(c, batch_size=1, workers=1, lengths=[1, 1], keep_supernets=True)
    free.train = replace(c.train, checkpoint_every=3)
    assert stored_results([replace(own, config=free)]) == ([kept], [])
    assert stored_results([replace(own, seed=1, folder=tmp_path / "01")])[0] == []
    others = [
        replace(own, config=replace(c, **options))
        for options in (
            {"budgets": [0.5]},
            {"random_draws": 2},
            {"headroom_sequences": 2},
            {"hindsight": False},
            {"lengths": [2]},
            {"variants": {"base": {"train": {"lr": 1}}}},
        )
    ]
    for other in others:
        with pytest.raises(UserError, match=r"result.json was made under other settings: choose another name"):
            stored_results([other])
    checkpoints = Run(own.folder).supernet
    checkpoints.mkdir()
    (checkpoints / "step-000001.json").touch()  # of a supernet that is kept: it can be judged again
    for other in others:
        assert stored_results([other]) == ([], [other])


def test_a_variant_may_be_renamed(tmp_path: Path) -> None:
    c = small(tmp_path)
    kept = stored(job(c))
    renamed = replace(c, variants={"first": {}})
    assert stored_results([job(renamed, "first")]) == ([{**kept, "variant": "first"}], [])


def test_results_of_other_text_are_not_mixed(tmp_path: Path) -> None:
    own = job(small(tmp_path))
    stored(own)
    with pytest.raises(UserError, match=r"is of other text than data\.path holds now: choose another name"):
        stored_results([replace(own, text="later")])
    write_json(own.result, {"format": FORMAT + 1})
    with pytest.raises(UserError, match=r"result.json has another format than this natsl writes"):
        stored_results([own])


def test_results_of_another_training_are_not_mixed(tmp_path: Path) -> None:
    """A half-done ablation of another version is refused, a finished one is read."""
    jobs = [job(small(tmp_path), seed=seed) for seed in (0, 1)]
    older = [stored(jobs[0], version=2)]
    with pytest.raises(UserError, match=r"'base', seed 0, is of a natsl .* \(training version 2, now 3\): finish"):
        stored_results(jobs)
    older.append(stored(jobs[1], version=2))
    assert stored_results(jobs) == (older, [])


@pytest.mark.parametrize("older", [[{"variant": "base", "recall": {}}], {"format": 3}], ids=["older", "newer"])
def test_results_of_another_format_are_left_as_they_are(older: Any, tmp_path: Path, text: str) -> None:
    run = Run.open("a", tmp_path)
    write_json(run.path / "ablation.json", older)
    (run.path / "jobs").mkdir()
    write_json(run.path / "jobs" / "00-0.json", {"recall": {}})
    before = {path: path.read_bytes() for path in run.path.rglob("*.json")}
    with pytest.raises(UserError, match=r"ablation.json has results of another format .* choose another name"):
        run_ablation(small(tmp_path, text))
    assert {path: path.read_bytes() for path in run.path.rglob("*.json")} == before


def test_a_job_takes_the_device_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job 0 holds its GPU until all others are done, one after another on the second GPU."""
    monkeypatch.setattr(pool, "_work", note_device)
    jobs = [job(small(tmp_path), seed=seed) for seed in range(4)]
    used = {result["seed"]: result["device"] for result in run_jobs(jobs, 2, ["cuda:0", "cuda:1"])}
    assert used == {0: "cuda:0", 1: "cuda:1", 2: "cuda:1", 3: "cuda:1"}


def test_workers_take_devices_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_work", meet)
    jobs = [job(small(tmp_path), seed=seed) for seed in range(3)]
    used = {result["seed"]: result["device"] for result in run_jobs(jobs, 5, ["cuda:0", "cuda:1"])}
    assert used == {0: "cuda:0", 1: "cuda:1", 2: "cuda:0"}


def test_a_job_that_fails_ends_the_command_with_its_name(tmp_path: Path, text: str) -> None:
    """Its mistake in one line, an unexpected error with its traceback; the process is gone in both cases."""
    c = small(tmp_path, text)
    c.train = replace(c.train, steps=9, lr=1e30, max_bad_steps=2)
    with pytest.raises(UserError, match=r"^variant 'base', seed 3: loss or gradient was not finite for 2 steps"):
        list(run_jobs([job(c, seed=3)], 1, ["cpu"]))
    broken = job(small(tmp_path, text), seed=4)
    broken.folder.parent.mkdir(exist_ok=True)
    broken.folder.write_text("a file in the place of the folder")
    with pytest.raises(RuntimeError, match=r"(?s)^variant 'base', seed 4:\nTraceback.*FileExistsError"):
        list(run_jobs([broken], 1, ["cpu"]))
    assert not multiprocessing.active_children()


def test_a_job_whose_process_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_work", be_killed)
    jobs = [job(small(tmp_path), seed=seed) for seed in range(3)]
    message = r"variant 'base', seed 1: its process was killed \(exit code -9; .*\); the same command goes on"
    with pytest.raises(UserError, match=message):
        list(run_jobs(jobs, 3, ["cpu"]))
    assert not multiprocessing.active_children()


def test_text_that_changes_while_a_command_runs(tmp_path: Path, text: str) -> None:
    own = job(small(tmp_path, text))
    Path(text).write_text(Path(text).read_text() + "more\n")
    with pytest.raises(UserError, match=r"data.path = '.*' has changed since the command began"):
        run_job(own, "cpu")
    assert not own.folder.exists()


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("cpu", 2, ["cpu"]),
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:1", 2, ["cuda:1"]),
    ],
)
def test_which_devices_are_used(name: str, gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert visible_devices(name) == expected


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_workers_end_with_the_command_and_leave_their_checkpoints(
    how: signal.Signals, tmp_path: Path, text: str
) -> None:
    options = [f"root={tmp_path}", "name=a", "device=cpu", "seeds=[0,1]", "variants={base: {}}", "data.seq_len=64"]
    options += [f"data.path={text}", "train.steps=1000000", "train.checkpoint_every=1", "train.warmup_steps=0"]
    line = [sys.executable, "-m", "natsl", "ablation", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    jobs = tmp_path / "a" / "jobs"
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for _ in range(1200):
                begun = {path.parent.parent.name for path in jobs.glob("*/supernet/step-*.json")}
                if len(begun) == 2 or process.poll() is not None:
                    break
                time.sleep(0.1)
            process.send_signal(how)
            out, err = process.communicate(timeout=120)  # ends only once no worker holds the pipes any more
        finally:
            process.kill()
    assert begun == {"00-0", "00-1"}, err
    if how is signal.SIGTERM:
        assert (process.returncode, out, err.splitlines()[-1]) == (143, "", "terminated")
    assert "Traceback" not in err
    assert all(checkpoint.read_newest(jobs / name / "supernet") is not None for name in begun)
    assert not list(jobs.glob("*/result.json"))
