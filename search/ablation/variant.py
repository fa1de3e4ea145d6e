"""A variant: the sections of a configuration with some options changed. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from natsl.config import ModelConfig, SupernetConfig, TrainConfig, check_batch, check_chunks
from natsl.errors import UserError
from natsl.space.check import check, shown
from natsl.tasks import DataConfig

C = TypeVar("C")
_SUPERNET = frozenset(item.name for item in dataclasses.fields(SupernetConfig))


@dataclass(frozen=True)
class Variant:
    """What decides a supernet beside its seed."""

    model: ModelConfig
    data: DataConfig
    supernet: SupernetConfig
    train: TrainConfig

    def check(self) -> None:
        """Raise ``ValueError`` unless the sandwich fits the batch and sequences have complete chunks."""
        check_batch(self.model.layers, self.train, self.supernet)
        check_chunks(self.model.chunk_size, self.data.seq_len)

    def changed(self, overrides: Mapping[str, Any]) -> Variant:
        """This variant with ``overrides``: section → option → value, nested as the options are.

        An option that is a dictionary or a list, such as ``data.tasks``, is replaced as a whole. ``ValueError`` naming
        the option, its value and what is allowed.
        """
        sections = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in overrides:
            if name not in sections and name in _SUPERNET:
                value = shown(overrides[name])
                raise UserError(f"{name} = {value} is not in a section: write supernet: {{{name}: {value}}}")
            check(name in sections, "section", name, f"the sections are {', '.join(sections)}")
        return Variant(**sections | {name: _changed(sections[name], overrides[name], name) for name in overrides})


def _changed(section: C, overrides: Any, name: str) -> C:
    """A copy of a config dataclass with other values of some fields; ``name`` is its own for errors."""
    fields = {item.name for item in dataclasses.fields(section)}  # type: ignore[arg-type]
    check(isinstance(overrides, Mapping), name, overrides, f"a section is a mapping with {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for key, value in overrides.items():
        if key not in fields:
            raise UserError(
                f"unknown option {name}.{key} = {shown(value)}: the options are {', '.join(sorted(fields))}"
            )
        own = getattr(section, key)
        if dataclasses.is_dataclass(own):
            values[key] = _changed(own, value, f"{name}.{key}")
        else:
            values[key] = _typed(type(section), key, value, f"{name}.{key}")
    return dataclasses.replace(section, **values)  # type: ignore[type-var]


def _typed(kind: type, key: str, value: Any, name: str) -> Any:
    """A value as the command line would read it for this field."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = OmegaConf.structured(kind)
    try:
        node[key] = value
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise UserError(f"{name} = {shown(value)} is not allowed: {reason}") from None
    typed = node[key]
    return OmegaConf.to_object(typed) if OmegaConf.is_config(typed) else typed
