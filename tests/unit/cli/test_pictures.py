"""The three pictures of ``s3queue top``: real queues in virtual time, drawn at 80 and 160 columns."""

from __future__ import annotations

import pytest

from s3queue_async.cli.top_view import state_of
from s3queue_async.testing.clock import run_virtual
from tests.integration.cli.pictures import SCENES, drawn, figures_of


@pytest.mark.parametrize("scene", SCENES)
def test_pictures(scene: str) -> None:
    """Idle, busy and throttled say so, with figures that fit; they become pictures as they are."""
    figures = run_virtual(lambda: figures_of(scene, 40))
    assert state_of(figures)[0] == scene
    assert (figures.overview.stats.completed > 0) == (scene != "idle")
    assert (figures.throttled_per_minute > 0) == (scene == "throttled")
    assert figures.cost_per_hour > 0
    assert len(figures.workers) == (2 if scene == "idle" else 6)
    for width in (80, 160):
        text, svg = drawn(figures, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert scene in text
        assert svg.startswith("<svg")
