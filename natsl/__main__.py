"""``python -m natsl <verb>``."""

from __future__ import annotations

from natsl.cli.main import main

if __name__ == "__main__":
    main()
