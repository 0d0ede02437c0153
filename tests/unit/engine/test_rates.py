"""What the coordinator knows of how fast workers are."""

from __future__ import annotations

import pytest

from s3queue_async.engine.coordinator import Rates


def test_a_steady_worker() -> None:
    """After a few seconds the rate is what is done in one, whatever the steps."""
    rates = Rates()
    for n in range(100):
        rates.add("w", 20, n * 0.1, since=0.0)
    assert rates.a_second("w", 9.9) == pytest.approx(200, rel=0.1)
    assert rates.lately("w", 9.9) == pytest.approx(200, rel=0.1)


def test_a_worker_that_has_just_begun() -> None:
    """What it did in the part of a second since it began stands for the whole; without that it is all there is."""
    rates = Rates()
    rates.add("w", 20, 7.1, since=7.0)
    assert rates.lately("w", 7.1) == 20
    assert rates.a_second("w", 7.1) == pytest.approx(200, rel=0.1)
    rates.add("slow", 20, 7.1, since=0.0)
    assert rates.a_second("slow", 7.1) == pytest.approx(20, rel=0.1)
    rates.add("sudden", 20, 7.1, since=7.1)
    assert rates.a_second("sudden", 7.1) < 500


def test_a_worker_that_did_nothing_begins_anew() -> None:
    """It is measured from its new beginning; others and nobody are 0."""
    rates = Rates()
    rates.add("w", 20, 0.1, since=0.0)
    rates.add("w", 20, 100.1, since=100.0)
    assert rates.a_second("w", 100.1) == pytest.approx(200, rel=0.1)
    rates.keep({"x"})
    assert rates.a_second("w", 100.1) == rates.lately("w", 100.1) == rates.lately("nobody", 0.0) == 0.0
