"""``python -m tests.storm``: see ``runner``."""

from __future__ import annotations

from tests.storm.runner import main

# The fork server's children must not begin another storm.
if __name__ == "__main__":
    raise SystemExit(main())
