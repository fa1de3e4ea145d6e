"""``python -m search``: train a supernet, search its routing policies, and report the front beside its baselines."""

from __future__ import annotations

from natsl.cli.main import run_verb

if __name__ == "__main__":
    run_verb("search")
