"""What a seed means: how big the cluster is, what it is to do, and what goes wrong meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from s3queue_async import Settings
from tests.simulation.history import Job
from tests.simulation.store import PROFILES, Faults, Profile

FAULTY_FOR_S = 80.0
PROCESS_FAULTS = {"crash": 3, "pause": 3, "suspend": 1, "cut": 3, "jump": 2, "stutter": 1, "terminate": 2}
"""What is done to processes, and how often at most in one scenario."""
BOARD_FAULTS = {"board deleted": 4, "tickets deleted": 4, "tickets mixed up": 4, "heartbeats not listed": 2}
"""What is done to hints, and how often at most in one scenario: it may cost time, and nothing else."""


@dataclass(frozen=True)
class Scenario:
    """What a seed means."""

    seed: int
    profile: Profile
    settings: Settings
    workers: int
    producers: int
    producers_work: bool
    jobs: tuple[Job, ...]
    faults: Faults
    deeds: dict[str, int]
    hints: dict[str, int]
    lulls: float
    deeds_within_s: float
    drift: float
    page_max: int
    concurrency: int
    conditional_delete: bool
    is_new: bool
    encrypted: bool = field(default=False, repr=False)
    """Every process encrypts, with one of two keys, and some compress: no two of them write the same bytes."""

    @property
    def faultless(self) -> bool:
        """Nothing goes wrong at all."""
        return not any(self.deeds.values()) and not self.faults.any


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = Random(f"scenario {seed}")
    severity = rng.choice((0.0, 0.3, 1.0, 2.0, 3.0))

    def chance(most: float) -> float:
        return rng.uniform(0, most) * severity if rng.random() < 0.7 else 0.0

    faults = Faults(
        lost_request=chance(0.03),
        lost_reply=chance(0.03),
        late=chance(0.03),
        repeated=chance(0.03),
        throttled=chance(0.03),
        server_error=chance(0.02),
        error_after_applying=chance(0.02),
        conflict=chance(0.05),
        slow=chance(0.02),
    )
    if severity and Random(f"outages {seed}").random() < 0.15:
        faults.outages = 2
    visibility_s = rng.choice((6.0, 10.0, 20.0))
    segment_age_s, claim_linger_s = rng.choice(((2.0, 4.0), (5.0, 10.0), (5.0, 10.0)))
    hint_rng = Random(f"hints {seed}")
    settings = Settings(
        coordinator=hint_rng.random() < 0.85,
        election_interval=hint_rng.choice((1.0, 5.0)),
        term_duration=hint_rng.choice((15.0, 300.0)),
        ticket_ttl=hint_rng.choice((3.0, 30.0)),
        dispatch_interval=hint_rng.choice((0.1, 0.5)),
        ticket_batch=hint_rng.choice((1, 5, 1000)),
        visibility_timeout=visibility_s,
        heartbeat_interval=visibility_s / 3,
        segment_age=segment_age_s,
        claim_linger=claim_linger_s,
        poll_interval=rng.choice((0.2, 1.0)),
        max_poll_interval=rng.choice((2.0, 8.0)),
        segment_messages_max=rng.choice((1, 4, 16, 256)),
        split_after=rng.choice((None, 0.5, 2.0)),
        checkpoint_interval=rng.choice((0.5, 5.0)),
        backoff_base=rng.choice((0.2, 1.0)),
        max_attempts=rng.choice((2, 3, 5)),
        drain_timeout=rng.choice((1.0, 10.0)),
        retain_completed=rng.choice((None, None, 3600.0)),
    )
    process_faults = rng.random() < 0.7
    jobs = []
    for number in range(rng.choice((rng.randint(3, 12), rng.randint(3, 12), rng.randint(10, 40)))):
        kind = rng.choices(
            ("ok", "fails", "retry", "dead", "release", "poison"), (70, 10, 5, 3, 4, 2 if process_faults else 0)
        )[0]
        duration_s = rng.choice((0.0, 0.01, 0.3, 2.0, rng.uniform(0, 12.0)))
        jobs.append(Job(number, kind, duration_s, rng.randint(1, settings.max_attempts - 1)))
    return Scenario(
        seed=seed,
        profile=rng.choice(PROFILES),
        settings=settings,
        workers=rng.choice((1, 2, 2, 2, 3, 4)),
        producers=rng.randint(1, 2),
        producers_work=rng.random() < 0.3,
        jobs=tuple(jobs),
        faults=faults,
        deeds={deed: rng.randint(0, most) if process_faults else 0 for deed, most in PROCESS_FAULTS.items()},
        hints={
            deed: hint_rng.randint(0, most) if hint_rng.random() < 0.5 else 0 for deed, most in BOARD_FAULTS.items()
        },
        lulls=hint_rng.choice((0.0, 0.0, 0.0, 0.3)),
        deeds_within_s=rng.choice((10.0, 20.0, 40.0, FAULTY_FOR_S)),
        drift=rng.uniform(-4e-4, 4e-4),
        page_max=rng.choice((2, 7, 1000)),
        concurrency=rng.choice((1, 3, 8)),
        conditional_delete=rng.random() < 0.7,
        is_new=rng.random() < 0.25,
    )
