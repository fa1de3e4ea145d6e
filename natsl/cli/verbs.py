"""The commands by name: what ``natsl``, its help, the schemas of ``natsl.conf`` and the old spellings are made from."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One command; ``config`` and ``function`` are ``module:name``, imported when they are needed.

    With a ``config`` class the function takes an object of it, composed from ``conf/<name>.yaml``. Without one it takes
    the arguments as they are.
    """

    name: str
    summary: str
    function: str
    config: str | None = None


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "search",
            "train a supernet, search its policies, report the front",
            "natsl.cli.commands:run_search",
            "natsl.search.config:SearchRunConfig",
        ),
        Verb(
            "plan",
            "what a search, or an outer search, will take: time, memory, disk",
            "natsl.cli.plan:run_plan",
            "natsl.cli.plan:PlanConfig",
        ),
        Verb(
            "train",
            "train a supernet only",
            "natsl.cli.commands:run_training",
            "natsl.cli.commands:TrainRunConfig",
        ),
        Verb(
            "export",
            "write a point of a front, or any policy, as a model of its own",
            "natsl.cli.commands:run_export",
            "natsl.cli.commands:ExportConfig",
        ),
        Verb(
            "verify",
            "check that an exported folder still gives what it gave",
            "natsl.cli.commands:run_verification",
            "natsl.cli.commands:VerifyConfig",
        ),
        Verb(
            "generate",
            "continue a prompt",
            "natsl.cli.generation:run_generation",
            "natsl.cli.generation:GenerateConfig",
        ),
        Verb(
            "evaluate",
            "score a point, a policy, a budget or an export on held-out data",
            "natsl.cli.evaluation:run_evaluation",
            "natsl.cli.evaluation:EvaluateRunConfig",
        ),
        Verb(
            "calibrate",
            "make the table that turns budgets into thresholds on other text",
            "natsl.cli.commands:run_calibration",
            "natsl.cli.commands:CalibrateConfig",
        ),
        Verb(
            "bench",
            "time the kernels against dense attention; bench search: compare the samplers",
            "natsl.cli.bench:main",
        ),
        Verb(
            "throughput",
            "time training, prefill and decoding against a model with dense attention",
            "natsl.cli.commands:run_throughput",
            "natsl.throughput:ThroughputConfig",
        ),
        Verb(
            "latency",
            "time the layers of a model, which decode_ms and prefill_ms are made of",
            "natsl.cli.latency:run_latency",
            "natsl.cli.latency:LatencyConfig",
        ),
        Verb(
            "outer",
            "search settings of the training, a supernet each, by the front of its policies",
            "natsl.search.outer.command:run_outer",
            "natsl.search.outer.config:OuterRunConfig",
        ),
        Verb(
            "ablation",
            "train variants of a supernet and compare their routers",
            "natsl.search.ablation.command:run_ablation",
            "natsl.search.ablation.config:AblationConfig",
        ),
    )
}


def load(path: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
