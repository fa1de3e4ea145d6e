"""The command ``natsl ablation``: variants × seeds, their results, tables and pictures. No torch at import.

A job that is done is kept, one that was cut off goes on from its checkpoint: the same command again runs what is
missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import read_json, to_plain, write_bytes, write_text
from natsl.progress import Progress
from natsl.run import Run
from natsl.search.ablation.config import AblationConfig, check_headroom
from natsl.search.ablation.job import Job
from natsl.search.ablation.pool import run_jobs, stored_results
from natsl.search.ablation.record import FORMAT
from natsl.search.ablation.table import report
from natsl.secrets import redact, redact_text


def run_ablation(config: AblationConfig) -> None:
    """Train and judge every variant with every seed, or what is missing of it, and compare them."""
    devices = visible_devices(config.device)
    texts = check_data(config)
    run = Run.open(config.name, config.root)
    with run.lock():
        results_file = run.path / "ablation.json"
        _check_format(results_file)
        jobs = [
            Job(config, name, seed, run.path / "jobs" / f"{i:02d}-{seed}", texts[name])
            for seed in config.seeds
            for i, name in enumerate(config.variants)
        ]
        results, waiting = stored_results(jobs)
        run.write_config(config)
        write_results(results_file, results, jobs)
        with Progress("ablation", len(jobs), len(results)) as progress:
            for result in run_jobs(waiting, config.workers, devices):
                results.append(result)
                write_results(results_file, results, jobs)
                progress.update(len(results), f"{result['variant']}, seed {result['seed']}")
        text = report(results, config)
        write_text(run.path / "ablation.md", redact_text(text))
        _draw(run.path, results, config)
    print(text, end="")
    print(f"note: tables and pictures are in {run.path}: ablation.md, share.png, loss.png", file=sys.stderr)


def visible_devices(name: str) -> list[str]:
    """The devices that jobs are spread over: all GPUs for ``cuda``, and for ``auto`` where there are any."""
    device = resolve_device(name)
    if device.type != "cuda" or device.index is not None:
        return [str(device)]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def check_data(config: AblationConfig) -> dict[str, str]:
    """Fingerprint of the text of every variant; ``UserError`` naming the variant whose data do not go together."""
    from natsl.data import Corpus, Split, TaskData, load_text

    known: dict[str, Corpus] = {}
    texts = {}
    for name in config.variants:
        variant = config.variant(name)
        settings = variant.data
        key = repr((settings.path, settings.text_rules()))
        where = f"variants.{name}"
        try:
            if key not in known:
                known[key] = load_text(settings.path, settings.text_rules(config.root))
            data = TaskData(settings, known[key], variant.model.vocab_size)
            if config.headroom_sequences:
                check_headroom(variant.model.chunk_size, settings)
            for factor in config.factors[1:]:
                where = f"variants.{name}, lengths = {factor}"
                for task in data.tasks:
                    data.batch(task, Split.test, 1, seed=0, length=factor * settings.seq_len, grow=True)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        texts[name] = known[key].fingerprint
    return texts


def _check_format(path: Path) -> None:
    """Raise ``UserError`` if there are results of an older format, which are left as they are."""
    stored = read_json(path) if path.exists() else []
    if not isinstance(stored, list) or any(result.get("format") != FORMAT for result in stored):
        raise UserError(f"{path} has results of another format than this natsl writes: choose another name")


def write_results(path: Path, results: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> None:
    """All results in the order of the jobs, a line each, without secrets."""
    order = {(job.variant, job.seed): i for i, job in enumerate(jobs)}
    lines = [
        json.dumps(redact(to_plain(result)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for result in sorted(results, key=lambda result: order[result["variant"], result["seed"]])
    ]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def _draw(folder: Path, results: Sequence[dict[str, Any]], config: AblationConfig) -> None:
    from natsl.search.ablation.picture import kept_png, loss_png, share_png

    names = list(config.variants)
    last = (config.routed or names)[-1]
    write_bytes(folder / "share.png", share_png(results, names))
    write_bytes(folder / "loss.png", loss_png(results, last))
    sample = next((r["sample"] for r in results if r["variant"] == last and r["sample"] is not None), None)
    if sample is not None:
        title = f"{last}: what is kept at a budget of {sample['budget']:g} in the best layers"
        write_bytes(folder / "kept.png", kept_png(sample, title))
