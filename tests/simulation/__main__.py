"""``python -m tests.simulation``: see ``runner``, which the processes of its pool can import."""

from __future__ import annotations

from tests.simulation.runner import main

raise SystemExit(main())
