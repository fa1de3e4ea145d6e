"""Small ablations, and results as a job writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from natsl.config import SupernetConfig, TrainConfig
from natsl.data import load_text
from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.job import Job
from natsl.tasks import DataConfig
from tests.oracles import tiny_config

Variants = dict[str, dict[str, Any]]


def small(root: Path, text: str | None = None, variants: Variants | None = None) -> AblationConfig:
    """Two variants of a tiny model on recall, one seed, one step each."""
    return AblationConfig(
        name="a",
        root=str(root),
        device="cpu",
        workers=2,
        seeds=[0],
        budgets=[0.25],
        random_draws=1,
        variants=variants or {"base": {}, "chosen": {"supernet": {"counterfactual": "none"}}},
        model=tiny_config("rr"),
        data=DataConfig(path=text, seq_len=64, search_sequences=2, test_sequences=3),
        supernet=SupernetConfig(calibration_sequences=8, calibration_points=17, random_policies=2, route_noise=0.0),
        train=TrainConfig(steps=1, batch_size=4, warmup_steps=0),
    )


def job(config: AblationConfig, variant: str = "base", seed: int = 0) -> Job:
    """A job of an ablation, in the folder that the command would give the first variant; "text" stands for no text."""
    text = "text" if config.data.path is None else load_text(config.data.path).fingerprint
    return Job(config, variant, seed, Path(config.root, config.name, "jobs", f"00-{seed}"), text)


def judged(spread: str, budget: float, learned: float, share: float | None = None, kept: float = 0.1) -> dict[str, Any]:
    """One policy in the task bytes; chunks at random are .1 worse, whole heads .2, windows .05, .06 and .07 better."""
    controls = {"random_heads": {"value": learned + 0.1, "std": 0.01}, "static": {"value": learned + 0.2}}
    controls["sink_window"] = {"value": learned - 0.05}
    controls["fixed_window"] = {"value": learned - 0.06}
    controls["fixed_half"] = {"value": learned - 0.07}
    controls["oracle"] = {"value": learned - 0.1, "kept": kept / 2, "bytes": 500.0 * kept}
    plain = {
        "metric": "val_loss",
        "learned": {"value": learned, "kept": kept, "bytes": 1000 * kept},
        "kept_by_head": [[kept, kept]],
        "controls": controls,
        "selection_share": None if share is None else {"value": share, "error": 0.5, "gap": 1.0, "gap_error": 0.1},
    }
    return {"spread": spread, "budget": budget, "policy": "D", "tasks": {"bytes": plain}}


def result(variant: str, seed: int, policies: list[dict[str, Any]], problems: tuple[str, ...] = ()) -> dict[str, Any]:
    """The result of a job at length 1 with these policies."""
    anchors: Mapping[str, Any] = {"bytes": {"metric": "val_loss", "softmax": 1.0 + seed, "delta": 4.0}}
    at = {"length": 1, "tokens": 64, "sequences": 3, "anchors": anchors, "policies": policies}
    return {
        "format": 2,
        "variant": variant,
        "seed": seed,
        "lengths": [at],
        "headroom": [],
        "sample": None,
        "problems": list(problems),
    }
