"""The ablation: jobs in processes, kept results, the table, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from natsl.config import Counterfactual, ModelConfig, SupernetConfig, TrainConfig
from natsl.errors import UserError
from natsl.files import write_json
from natsl.run import Run
from natsl.search import ablation
from natsl.search.ablation import AblationConfig, Job, run_ablation, run_jobs, table
from natsl.tasks import DataConfig


def config(root: Path, variants: dict[str, dict[str, object]] | None = None) -> AblationConfig:
    return AblationConfig(
        name="a",
        root=str(root),
        device="cpu",
        workers=2,
        seeds=[0, 1],
        budgets=[0.25],
        random_draws=1,
        variants=variants or {"base": {}, "chosen": {"counterfactual": "none"}},
        model=ModelConfig(associative_init=True),
        data=DataConfig(seq_len=64, test_sequences=2),
        supernet=SupernetConfig(calibration_sequences=8),
        train=TrainConfig(steps=1, batch_size=4, warmup_steps=0),
    )


def test_every_variant_is_trained_with_every_seed_and_results_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ablation(config(tmp_path))
    first = capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert sorted((r["variant"], r["seed"]) for r in results) == [
        ("base", 0),
        ("base", 1),
        ("chosen", 0),
        ("chosen", 1),
    ]
    assert first.count("\n") == 4
    assert "| 0.25: learned / random [kept] |" in first

    def refuse(job: object) -> None:
        raise AssertionError("a job that is done was run again")

    monkeypatch.setattr(ablation, "run_job", refuse)
    run_ablation(config(tmp_path))
    assert capsys.readouterr().out == first


def test_results_of_other_text_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(job: Job) -> dict[str, object]:
        return {"variant": "base", "seed": job.seed, "fingerprint": job.fingerprint(), "text": job.text}

    job = Job(config(tmp_path), "base", 0, tmp_path / "job.json", "now")
    monkeypatch.setattr(ablation, "run_job", done)
    write_json(job.path, done(job))
    assert [result["text"] for result in run_jobs([job], 1)] == ["now"]
    with pytest.raises(UserError, match=r"is of other text than data\.path holds now: choose another name"):
        list(run_jobs([replace(job, text="later")], 1))


def test_results_of_another_training_are_not_mixed(tmp_path: Path) -> None:
    """A half-done ablation of an older version is refused, a finished one is read."""
    jobs = [Job(config(tmp_path), "base", seed, tmp_path / f"{seed}.json") for seed in (0, 1)]
    older = [{"variant": "base", "seed": job.seed, "fingerprint": job.fingerprint()} for job in jobs]
    write_json(jobs[0].path, older[0])
    with pytest.raises(UserError, match=r"0.json is of a natsl that trains in another way .* 1, now 3\): finish"):
        list(run_jobs(jobs, 1))
    write_json(jobs[1].path, older[1])
    assert list(run_jobs(jobs, 1)) == older


def test_results_from_before_text_could_be_chosen_are_kept() -> None:
    c = config(Path("unused"))
    c.data.mqar.shift = False
    job = Job(c, "base", 0, Path("unused"))
    assert job.fingerprint() == "a38d8f1f269aadaf"
    c.data.include = ["*.md"]
    assert job.fingerprint() != "a38d8f1f269aadaf"


def test_variants_change_one_thing() -> None:
    c = config(Path("unused"))
    assert c.variant("base") == c.supernet
    assert c.variant("chosen").counterfactual is Counterfactual.none
    assert c.variant("chosen").project_budget == c.supernet.project_budget


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"x": {"counterfactuals": "none"}}, r"variants.x = 'counterfactuals' is not allowed: the fields are"),
        ({"x": {"counterfactual": "all"}}, r"counterfactual = 'all' is not allowed: it must be one of none"),
        ({"x": {"random_policies": 3}}, r"train.batch_size = 4 is not allowed: it must be a multiple of the 5"),
    ],
    ids=["field", "value", "batch"],
)
def test_bad_variants_are_refused(variants: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(Path("unused"), variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8}, r"data.seq_len = 8 is not allowed: calibration needs complete chunks"),
        ({"seq_len": 72}, r"data.seq_len = 72 is not allowed: mqar needs a multiple of data.mqar.segment = 16"),
    ],
    ids=["shorter than a chunk", "not for the task"],
)
def test_data_that_do_not_fit_are_refused_before_there_is_a_run(
    options: dict[str, int], message: str, tmp_path: Path
) -> None:
    c = config(tmp_path)
    c.data = replace(c.data, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        run_ablation(c)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_ends_the_workers_too(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = [f"root={tmp_path}", "name=a", "device=cpu", "seeds=[0,1]", "variants={base: {}}", "data.seq_len=64"]
    options += ["train.steps=1000000", "train.checkpoint_every=1", "train.warmup_steps=0"]
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "natsl", "ablation", *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for _ in range(1200):
                trained = {path.parent for path in scratch.glob("*/step-*.json")}
                if len(trained) == 2 or process.poll() is not None:
                    break
                time.sleep(0.1)
            process.terminate()
            out, err = process.communicate(timeout=120)  # ends only once no worker holds the pipes any more
        finally:
            process.kill()
    assert len(trained) == 2, err
    assert (process.returncode, out, err.splitlines()[-1]) == (143, "", "terminated")
    assert "Traceback" not in err
    assert list(scratch.iterdir()) == []
    assert list((tmp_path / "a" / "jobs").iterdir()) == []


def test_the_table_shows_mean_and_lowest_seed(tmp_path: Path) -> None:
    scores = [{"softmax": 1.0, "delta": d, "0.25": {"learned": 0.8, "random": 0.5, "kept": d}} for d in (0.2, 0.4)]
    results = [{"variant": "base", "recall": s} for s in scores]
    text = table(results, config(tmp_path))
    assert "| base | 1.00 (1.00) | 0.30 (0.20) | 0.80 (0.80) / 0.50 [0.300] |" in text
    assert "| chosen | – | – | – |" in text


def test_the_run_folder_is_a_run(tmp_path: Path) -> None:
    run_ablation(config(tmp_path, {"base": {}}))
    assert Run.names(tmp_path) == ["a"]
