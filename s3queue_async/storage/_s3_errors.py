"""What an S3 error means: from a reply's status and code to this library's errors, without any I/O."""

from __future__ import annotations

from dataclasses import dataclass

from s3queue_async.errors import QueueError, StoreUnavailable, StoreUnsupported, Throttled
from s3queue_async.storage.base import Conflict, NotFound, PreconditionFailed

_MISSING_KEY = frozenset({"NoSuchKey", "NoSuchVersion", "NotFound", "404"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
# AWS: SlowDown, RequestLimitExceeded, Throttling*; MinIO: SlowDownRead/-Write; SeaweedFS: (Err)TooManyRequest;
# R2 and GCS: status 429. TooManyBuckets and its like must not match.
_THROTTLED = (
    "SlowDown",
    "Throttl",
    "TooManyRequest",
    "ErrTooManyRequest",
    "ErrRequestBytesExceed",
    "RequestLimitExceeded",
    "RequestThrottled",
    "BandwidthLimitExceeded",
)
_CREDENTIALS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "AuthFailure",
    }
)
_REGION = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "AuthorizationQueryParametersError",
        "IllegalLocationConstraintException",
    }
)
# Codes of a passing trouble that some stores send under a 4xx status.
_PASSING = frozenset({"RequestTimeout", "InternalError", "ServiceUnavailable", "IncompleteBody"})


@dataclass(frozen=True, slots=True)
class Failure:
    """An error reply of an S3 store.

    Attributes:
        operation: The S3 operation, such as ``PutObject``.
        status: The HTTP status; 200 is possible, for an error inside a successful reply.
        conditional: Whether the request carried If-Match or If-None-Match.
        names_version: Whether it carried If-Match.
    """

    operation: str
    bucket: str
    key: str
    status: int
    code: str
    message: str
    date_s: float | None
    retry_after_s: float | None = None
    conditional: bool = False
    names_version: bool = False


def classify(failure: Failure) -> QueueError:
    """Return the error to raise for a failed request; by code first, because some stores' statuses mislead."""
    code, status = failure.code, failure.status
    if code == "PreconditionFailed" or status == 412:
        return PreconditionFailed(failure.key, date_s=failure.date_s)
    if code != "NoSuchBucket" and (code in _MISSING_KEY or status == 404):
        if failure.names_version:
            return PreconditionFailed(failure.key, date_s=failure.date_s)
        if failure.operation in ("GetObject", "HeadObject"):
            return NotFound(failure.key, date_s=failure.date_s)
    if failure.conditional and code in _CONFLICT:
        return Conflict(failure.key, date_s=failure.date_s)
    if code.startswith(_THROTTLED) or status == 429:
        return Throttled(f"The store asks for fewer requests: {_said(failure)}.", retry_after_s=failure.retry_after_s)
    if failure.conditional and (code == "NotImplemented" or status == 501):
        return StoreUnsupported(f"The store does not implement conditional requests: {_said(failure)}.")
    return _unavailable(failure)


def _unavailable(failure: Failure) -> StoreUnavailable:
    code, bucket = failure.code, failure.bucket
    if code == "NoSuchBucket":
        return StoreUnavailable(
            f"The bucket {bucket!r} does not exist.",
            retriable=False,
            code=code,
            date_s=failure.date_s,
            suggestion="Create the bucket, or correct its name, the region or the endpoint_url in the url.",
        )
    if code in _CREDENTIALS:
        return StoreUnavailable(
            f"The store refused the credentials: {_said(failure)}.",
            retriable=False,
            code=code,
            date_s=failure.date_s,
            suggestion="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile or role) to valid credentials.",
        )
    if code == "RequestTimeTooSkewed":
        return StoreUnavailable(
            f"The store refused the request's time: {_said(failure)}.",
            retriable=False,
            code=code,
            date_s=failure.date_s,
            suggestion="Set this machine's clock right.",
        )
    if code in _REGION:
        return StoreUnavailable(
            f"The bucket {bucket!r} is in another region: {_said(failure)}.",
            retriable=False,
            code=code,
            date_s=failure.date_s,
            suggestion="Add ?region=... to the url.",
        )
    if code in ("AccessDenied", "403") or failure.status == 403:
        return StoreUnavailable(
            f"Access denied to {failure.operation} on bucket {bucket!r}: {_said(failure)}.",
            retriable=False,
            code=code,
            date_s=failure.date_s,
            suggestion=f"Allow these credentials {_PERMISSIONS.get(failure.operation, failure.operation)}.",
        )
    # Under status 200 the code is all there is, and only what is known not to pass is listed above.
    passing = failure.status >= 500 or failure.status < 300 or code in _PASSING
    return StoreUnavailable(
        f"The store answered {_said(failure)}.",
        retriable=passing,
        code=code,
        date_s=failure.date_s,
        suggestion="Try again." if passing else "Correct what the store complains about.",
    )


_PERMISSIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject (and s3:GetObject for conditional deletes)",
    "DeleteObjects": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}


def _said(failure: Failure) -> str:
    message = failure.message.strip().rstrip(".")
    return f"{failure.operation} -> {failure.status} {failure.code}" + (f" ({message})" if message else "")
