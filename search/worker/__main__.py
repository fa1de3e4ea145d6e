"""``python -m natsl.search.worker``: a worker of a search, started by ``natsl.search.worker.child`` only."""

from __future__ import annotations

from natsl.search.worker.process import main

if __name__ == "__main__":
    main()
