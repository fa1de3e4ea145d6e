"""Registers the config dataclasses with Hydra; the YAML files beside it are presets and hold differences only."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from natsl.cli.verbs import VERBS, load

for _verb in VERBS.values():
    if _verb.config is not None:
        ConfigStore.instance().store(name=f"{_verb.name}_schema", node=load(_verb.config))
