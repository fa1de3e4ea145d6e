"""Registers the config dataclasses with Hydra; the YAML files beside it are presets and hold differences only."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from natsl.config import EvaluateRunConfig, ExportConfig, GenerateConfig, ThroughputConfig, TrainRunConfig
from natsl.search.ablation import AblationConfig
from natsl.search.config import SearchRunConfig

SCHEMAS = {
    "search": SearchRunConfig,
    "ablation": AblationConfig,
    "train": TrainRunConfig,
    "evaluate": EvaluateRunConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "throughput": ThroughputConfig,
}

for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)
