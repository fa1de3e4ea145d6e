"""natsl's exports in transformers: after ``import natsl`` its Auto classes load them. Nothing here is heavy.

transformers has no entry points, and neither package may load the other before it is wanted. So ``import natsl`` only
leaves a note with Python's import system: once transformers' own tables of model types have been imported, now or
later, ours are added to them (``natsl.hf.config``, ``natsl.hf.model``).
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_OLDEST, _NEWEST = (5, 23), (6, 0)  # of transformers: from the first on and before the second
_TABLES = {  # of transformers → what adds to it
    "transformers.models.auto.configuration_auto": "natsl.hf.config",
    "transformers.models.auto.modeling_auto": "natsl.hf.model",
}


class _AfterTables(MetaPathFinder):
    """Finds the tables as Python would without it, and has them completed when they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        loader = None if spec is None else spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is not None:

            def execute_and_complete(module: ModuleType) -> None:
                execute(module)
                _complete(fullname)

            spec.loader = copy.copy(loader)  # type: ignore[union-attr]  # which may be that of other modules too
            spec.loader.exec_module = execute_and_complete  # type: ignore[union-attr,method-assign]
        return spec


def _complete(table: str) -> None:
    """Add natsl's classes to a table of transformers; a warning, and nothing else, where that is impossible."""
    try:
        register = getattr(importlib.import_module(_TABLES[table]), "register", None)
        if register is not None:  # else it is being imported itself, and registers at its end
            register()
    except Exception as error:  # an unknown version of transformers must not fail because natsl was imported
        text = f"transformers does not know natsl's models: {type(error).__name__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def register_with_transformers() -> None:
    """Let transformers know natsl's models, now if its tables are there, else when they are imported."""
    if not any(isinstance(finder, _AfterTables) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTables())
    for table in _TABLES:
        if table in sys.modules:
            _complete(table)


def transformers_version() -> str | None:
    """The version of transformers that is installed; None if there is none that natsl works with."""
    from importlib import metadata  # which takes longer to import than natsl

    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return version if numbers and _OLDEST <= (int(numbers[1]), int(numbers[2])) < _NEWEST else None
