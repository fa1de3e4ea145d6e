"""``python -m search.ablation``: train variants of a supernet and compare their routers."""

from __future__ import annotations

from natsl.cli.main import run_verb

if __name__ == "__main__":
    run_verb("ablation")
