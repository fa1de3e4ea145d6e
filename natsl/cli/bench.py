"""``natsl bench``: of the kernels, or, with ``search`` before its options, of the samplers."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the benchmark that the command line of the process names."""
    program, *arguments = sys.argv
    if arguments[:1] == ["search"]:
        from natsl.search.bench.__main__ import main as bench_search

        sys.argv[:] = [f"{program} search", *arguments[1:]]
        return bench_search()
    from natsl.kernels.bench.__main__ import main as bench_kernels

    return bench_kernels()
