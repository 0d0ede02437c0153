"""Reads a bucket's set-up: versioning, lifecycle rules, uploads that were never ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from s3queue_async.errors import QueueError
from s3queue_async.storage.examine import BucketReport, LifecycleRule

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

_NO_RULES = frozenset({"NoSuchLifecycleConfiguration", "404"})

Translate = Callable[[BaseException, str], QueueError]


async def examine_bucket(client: S3Client, bucket: str, root: str, translate: Translate) -> BucketReport:
    """What the bucket says of itself; an operation that is refused, or that the store lacks, leaves its part unknown.

    Args:
        client: Connected.
        bucket: The bucket.
        root: What the queue's keys start with.
        translate: Makes an error of this library of what the client raised in an operation.
    """
    unknown: dict[str, str] = {}

    async def ask(operation: str, request: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await request()
        except Exception as error:  # noqa: BLE001 - reported as what is not known; botocore is not imported here
            response: Any = getattr(error, "response", {})
            if response.get("Error", {}).get("Code", "") in _NO_RULES:
                return {}
            unknown[operation] = str(translate(error, operation))
            return None

    versioning = await ask("GetBucketVersioning", lambda: client.get_bucket_versioning(Bucket=bucket))
    lifecycle = await ask(
        "GetBucketLifecycleConfiguration", lambda: client.get_bucket_lifecycle_configuration(Bucket=bucket)
    )
    uploads = await ask(
        "ListMultipartUploads", lambda: client.list_multipart_uploads(Bucket=bucket, Prefix=root, MaxUploads=1000)
    )
    return BucketReport(
        versioning=None if versioning is None else versioning.get("Status", ""),
        rules=None if lifecycle is None else rules_about(lifecycle.get("Rules", ()), root),
        uploads=None if uploads is None else len(uploads.get("Uploads") or ()),
        unknown=unknown,
    )


def rules_about(rules: Any, root: str) -> tuple[LifecycleRule, ...]:
    """The enabled rules that touch keys under the root, or some of them."""
    found = []
    for rule in rules:
        prefix = _prefix(rule)
        if rule.get("Status") != "Enabled" or not (prefix.startswith(root) or root.startswith(prefix)):
            continue
        expiration = rule.get("Expiration") or {}
        old = rule.get("NoncurrentVersionExpiration") or {}
        # A rule by date deletes whatever is there on that day, however young.
        days = expiration.get("Days", 0 if "Date" in expiration else None)
        found.append(
            LifecycleRule(
                name=rule.get("ID", ""),
                prefix=prefix,
                expires_days=days,
                moves_to=tuple(move.get("StorageClass", "?") for move in rule.get("Transitions") or ()),
                ends_old_versions_days=old.get("NoncurrentDays"),
            )
        )
    return tuple(found)


def _prefix(rule: Any) -> str:
    chosen = rule.get("Filter") or {}
    prefix: str = chosen.get("Prefix") or (chosen.get("And") or {}).get("Prefix") or rule.get("Prefix") or ""
    return prefix
