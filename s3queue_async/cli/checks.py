"""What ``s3queue doctor`` looks at, one check after the other; each names what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random  # noqa: TID251 - only the type: the instance is passed in
from statistics import median
from typing import Any, Literal

import msgspec

from s3queue_async.cli.screen import span
from s3queue_async.clock import Clock
from s3queue_async.errors import QueueError, StoreUnavailable, StoreUnsupported
from s3queue_async.storage.base import Deleted, NotFound, Page, Storage, Stored, Unmodified, Written
from s3queue_async.storage.examine import BucketReport, Examinable, LifecycleRule
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.storage.probe import probe

NAMESPACE = "doctor"
SKEW_TOLD_S = 1.0
SKEW_WARN_S = 60.0
SKEW_FAULT_S = 300.0
"""S3 refuses requests that are signed more than fifteen minutes off."""
LATENCY_TRIES = 8
LATENCY_WARN_S = 0.5
ACCESS = frozenset({"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "UnauthorizedAccess", "MethodNotAllowed"})
NEEDS = {
    "list": "s3:ListBucket",
    "get": "s3:GetObject",
    "put": "s3:PutObject",
    "delete": "s3:DeleteObject",
}

State = Literal["ok", "warn", "fault", "skipped"]


class Check(msgspec.Struct, frozen=True):
    """What one check found.

    Attributes:
        name: What was looked at.
        state: ``fault`` makes the command fail; ``warn`` costs money or will hurt.
        found: What is so.
        advice: What to do about it; "" where there is nothing to do.
    """

    name: str
    state: State
    found: str
    advice: str = ""


class Doctor:
    """Looks at one store from the outside in, and goes no further than the first wall.

    Args:
        storage: Not open.
        clock: Local time.
        random: Names what the checks write.
        wall: What this machine's clock shows, seconds since the epoch.
    """

    def __init__(self, storage: Storage, *, clock: Clock, random: Random, wall: Callable[[], float]) -> None:
        self._storage = storage
        self._clock = clock
        self._random = random
        self._wall = wall
        self._trial = PluginStorage(storage, NAMESPACE)
        self.checks: list[Check] = []
        self.lacking: list[str] = []
        self._skew_s: float | None = None

    async def examine(self) -> bool:
        """Check everything that concerns the store; whether a queue on it can be looked at."""
        try:
            if isinstance(self._storage, Examinable):
                await self._storage.connect()
            else:
                await self._storage.open()
        except QueueError as error:
            self._add("store", "fault", str(error.args[0]), error.suggestion)
            return False
        if not await self._check_reach():
            return False
        allowed = await self._check_permissions()
        await self._check_conditions(allowed)
        if allowed:
            await self._check_latency()
        if isinstance(self._storage, Examinable):
            self._check_bucket(await self._storage.examine())
        return "list" not in self.lacking and "get" not in self.lacking

    def _add(self, name: str, state: State, found: str, advice: str = "") -> None:
        self.checks.append(Check(name, state, found, advice))

    # -- reach, clock --------------------------------------------------------------------------------------------

    async def _check_reach(self) -> bool:
        """Whether the store answers at all, and what its clock says."""
        sent_s, began = self._wall(), self._clock.monotonic()
        try:
            date_s = (await self._storage.list("", limit=1)).date_s
        except QueueError as error:
            date_s = getattr(error, "date_s", None)
            code = getattr(error, "code", "")
            if code == "RequestTimeTooSkewed":
                self._add("store", "ok", "answers")
                self._told_skew(date_s, sent_s, "and so it refuses every request of this machine")
                return False
            if not is_denied(error):
                state = (
                    "is unreachable: " if isinstance(error, StoreUnavailable) and error.retriable and not code else ""
                )
                self._add("store", "fault", f"{state}{error.args[0]}", error.suggestion)
                return False
        self._add("store", "ok", f"answers in {span(self._clock.monotonic() - began)}")
        if date_s is None:
            self._add("clock", "skipped", "the store tells no time")
        else:
            self._told_skew(date_s, sent_s, "")
        return True

    def _told_skew(self, date_s: float | None, sent_s: float, consequence: str) -> None:
        if date_s is None:
            self._add(
                "clock", "fault", "this machine's clock is wrong: the store refuses the time of its requests", SET_CLOCK
            )
            return
        # The store's time is somewhere in the second that it names, and between the request and now.
        low, high = date_s - self._wall(), date_s + self._storage.date_resolution_s - sent_s
        skew_s = low if low > 0 else high if high < 0 else 0.0
        amount = f"this machine's clock is {span(abs(skew_s))} {'behind' if skew_s > 0 else 'ahead of'} the store's"
        if consequence or abs(skew_s) >= SKEW_FAULT_S:
            why = consequence or "stores refuse requests that are signed more than 15 minutes off"
            self._add("clock", "fault", f"{amount}; {why}", SET_CLOCK)
        elif abs(skew_s) >= SKEW_WARN_S:
            self._add("clock", "warn", amount, SET_CLOCK)
        else:
            self._add("clock", "ok", "agrees with the store's" if abs(skew_s) < SKEW_TOLD_S else amount)

    # -- permissions ---------------------------------------------------------------------------------------------

    async def _check_permissions(self) -> bool:
        """Try each thing that a queue does to the store; whether all of it is allowed."""
        key = f"{self._random.randbytes(8).hex()}/trial"
        may_put = await self._try("put", lambda: self._trial.put(key, b"doctor"))
        await self._try("get", lambda: self._get(key))
        await self._try("list", lambda: self._trial.list(""))
        may_delete = await self._try("delete", lambda: self._trial.delete(key))
        if may_delete:
            await self._try("delete", lambda: self._trial.delete_many([key]))
        elif may_put:
            self._add("leftovers", "warn", f"plugin/{NAMESPACE}/{key} stays, because it may not be deleted")
        names = ", ".join(NEEDS[what] for what in NEEDS if what in self.lacking)
        if not self.lacking:
            self._add("permissions", "ok", "may list, read, write and delete")
        else:
            what = {
                "list": "the bucket may not be listed", "get": "objects may not be read",
                "put": "objects may not be written", "delete": "objects may not be deleted",
            }  # fmt: skip
            said = "; ".join(what[one] for one in what if one in self.lacking)
            if {"put", "delete"} <= set(self.lacking):
                said = "the bucket is read-only for these credentials: " + said
            self._add(
                "permissions", "fault", f"{said} (lacking: {names})", "Attach the policy below to the credentials."
            )
        return not self.lacking

    async def _get(self, key: str) -> Stored | Unmodified | None:
        try:
            return await self._trial.get(key)
        except NotFound:
            # Nothing was written, and that may be seen.
            return None

    async def _try(
        self, what: str, request: Callable[[], Awaitable[Stored | Unmodified | Written | Deleted | Page | None]]
    ) -> bool:
        try:
            await request()
        except QueueError as error:
            if is_denied(error):
                if what not in self.lacking:
                    self.lacking.append(what)
            else:
                self._add(f"trying to {what}", "fault", str(error.args[0]), error.suggestion)
            return False
        return True

    # -- conditions, latency -------------------------------------------------------------------------------------

    async def _check_conditions(self, allowed: bool) -> None:
        if not allowed:
            self._add("conditional writes", "skipped", "cannot be tried without all permissions")
            return
        try:
            found = await probe(self._storage, random=self._random, clock=self._clock)
        except StoreUnsupported as error:
            self._add("conditional writes", "fault", str(error.args[0]), error.suggestion)
        except QueueError as error:
            self._add("conditional writes", "fault", f"could not be tried: {error.args[0]}", error.suggestion)
        else:
            deletes = "" if found.conditional_delete else "; If-Match on DELETE is ignored, the queue does without it"
            self._add("conditional writes", "ok", f"If-None-Match and If-Match are kept{deletes}")

    async def _check_latency(self) -> None:
        key = f"{self._random.randbytes(8).hex()}/latency"
        took: dict[str, list[float]] = {}
        try:
            for _ in range(LATENCY_TRIES):
                for name, request in (
                    ("PUT", lambda: self._trial.put(key, b"x" * 1024)),
                    ("GET", lambda: self._trial.get(key)),
                    ("LIST", lambda: self._trial.list("", limit=1)),
                    ("DELETE", lambda: self._trial.delete(key)),
                ):
                    began = self._clock.monotonic()
                    await request()
                    took.setdefault(name, []).append(self._clock.monotonic() - began)
        except QueueError as error:
            self._add("latency", "fault", str(error.args[0]), error.suggestion)
            return
        said = ", ".join(f"{name} {span(median(times))} (at most {span(max(times))})" for name, times in took.items())
        slow = max(median(times) for times in took.values()) > LATENCY_WARN_S
        advice = "Run the workers in the bucket's region; raise visibility_timeout where that is not possible."
        self._add("latency", "warn" if slow else "ok", said, advice if slow else "")

    # -- the bucket ----------------------------------------------------------------------------------------------

    def _check_bucket(self, report: BucketReport) -> None:
        for operation, why in report.unknown.items():
            self._add(operation, "skipped", f"not known: {why}")
        if report.versioning == "Enabled":
            self._add(
                "versioning",
                "fault",
                "the bucket keeps old versions: a queue deletes nearly every object soon, and each stays and is billed",
                "Use a bucket without versioning, or a lifecycle rule that ends noncurrent versions after a day.",
            )
        elif report.versioning == "Suspended":
            advice = "Delete the old versions, once, with a lifecycle rule."
            self._add("versioning", "warn", "is suspended: versions kept before are still billed", advice)
        elif report.versioning is not None:
            self._add("versioning", "ok", "is off")
        for rule in report.rules or ():
            self._check_rule(rule)
        if report.rules is not None and not report.rules:
            self._add("lifecycle rules", "ok", "none is about the queue")
        if report.uploads:
            advice = (
                "Abort them: aws s3api list-multipart-uploads, or a lifecycle rule with AbortIncompleteMultipartUpload."
            )
            self._add(
                "uploads", "warn", f"{report.uploads} unfinished uploads of somebody are stored and billed", advice
            )

    def _check_rule(self, rule: LifecycleRule) -> None:
        name = f"lifecycle rule {rule.name or '(unnamed)'}"
        about = f"prefix {rule.prefix!r}" if rule.prefix else "the whole bucket"
        fine = True
        if rule.expires_days is not None:
            fine = False
            found = (
                f"deletes objects of {about} after {rule.expires_days:g} days: delayed messages and dead letters, too"
            )
            self._add(name, "fault", found, "Exempt the queue's prefix.")
        if rule.moves_to:
            fine = False
            found = (
                f"moves objects of {about} to {', '.join(rule.moves_to)}: each move and a minimum of days are billed"
            )
            self._add(name, "warn", found, "Exempt the queue's prefix.")
        if fine:
            self._add(name, "ok", "costs the queue nothing")


SET_CLOCK = "Set this machine's clock: timedatectl set-ntp true, or chronyc makestep."


def is_denied(error: Exception) -> bool:
    """Whether the store refused what these credentials may not do."""
    return isinstance(error, StoreUnavailable) and error.code in ACCESS


def policy(bucket: str, prefix: str) -> dict[str, Any]:
    """The IAM policy that a queue needs, and no more: producers, workers and the command line alike."""
    root = f"{prefix}/" if prefix else ""
    listing: dict[str, Any] = {
        "Sid": "S3QueueList",
        "Effect": "Allow",
        "Action": [NEEDS["list"]],
        "Resource": f"arn:aws:s3:::{bucket}",
    }
    if root:
        listing["Condition"] = {"StringLike": {"s3:prefix": [f"{root}*"]}}
    objects = {
        "Sid": "S3QueueObjects",
        "Effect": "Allow",
        "Action": [NEEDS["get"], NEEDS["put"], NEEDS["delete"]],
        "Resource": f"arn:aws:s3:::{bucket}/{root}*",
    }
    return {"Version": "2012-10-17", "Statement": [listing, objects]}
