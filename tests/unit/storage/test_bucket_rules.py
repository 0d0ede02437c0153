"""Which lifecycle rules are about a queue, and what they do to it."""

from __future__ import annotations

from typing import Any

import pytest

from s3queue_async.storage._s3_bucket import rules_about

ROOT = "team/queue/"


def rule(**fields: Any) -> dict[str, Any]:
    return {"ID": "r", "Status": "Enabled", **fields}


@pytest.mark.parametrize(
    "found",
    [
        rule(),
        rule(Prefix=""),
        rule(Prefix="team/"),
        rule(Filter={"Prefix": "team/queue/"}),
        rule(Filter={"Prefix": "team/queue/dead/"}),
        rule(Filter={"And": {"Prefix": "team/", "Tags": []}}),
        rule(Filter={"ObjectSizeGreaterThan": 1}),
    ],
)
def test_about_the_queue(found: dict[str, Any]) -> None:
    """A prefix above the queue's, or inside of it, or none at all, whichever way it is written."""
    assert len(rules_about([found], ROOT)) == 1


@pytest.mark.parametrize(
    "found",
    [
        rule(Prefix="logs/"),
        rule(Filter={"Prefix": "team/queue2/"}),
        rule(Filter={"Prefix": ""}, Status="Disabled"),
    ],
)
def test_not_about_the_queue(found: dict[str, Any]) -> None:
    """Another prefix, or a rule that is off."""
    assert rules_about([found], ROOT) == ()


def test_what_it_does() -> None:
    """Expiry by days or by date, moves, and the end of old versions."""
    (one,) = rules_about([rule(Expiration={"Days": 3}, NoncurrentVersionExpiration={"NoncurrentDays": 1})], ROOT)
    assert (one.expires_days, one.ends_old_versions_days, one.moves_to) == (3, 1, ())
    (two,) = rules_about([rule(Expiration={"Date": "2026-01-01"}, Transitions=[{"StorageClass": "GLACIER"}])], ROOT)
    assert (two.expires_days, two.moves_to) == (0, ("GLACIER",))
    (three,) = rules_about([rule(Expiration={"ExpiredObjectDeleteMarker": True})], ROOT)
    assert three.expires_days is None
