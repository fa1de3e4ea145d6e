"""Train a supernet, search its routing policies, and report the front beside its baselines: ``python -m search``."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from natsl.cli import command_name, run_main
from natsl.search.config import SearchRunConfig


def main() -> None:
    """Entry of ``python -m search`` and ``natsl-search``."""
    command = shlex.join([*command_name().split(), *sys.argv[1:]])

    def search(config: SearchRunConfig) -> Any:
        from natsl.search.pipeline import run_search

        run_search(config, command)
        return 0

    run_main("search", SearchRunConfig, search)


if __name__ == "__main__":
    main()
