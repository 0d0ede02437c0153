"""What each answer of an S3 store means."""

from __future__ import annotations

import pytest

from s3queue_async.errors import StoreUnavailable, StoreUnsupported, Throttled
from s3queue_async.storage._s3_errors import Failure, classify
from s3queue_async.storage.base import Conflict, NotFound, PreconditionFailed


def _failure(
    operation: str, status: int, code: str, *, conditional: bool = False, names_version: bool = False
) -> Failure:
    return Failure(
        operation, "the-bucket", "the/key", status, code, "what it said.", 5.0, 7.0, conditional, names_version
    )


@pytest.mark.parametrize(
    ("operation", "status", "code", "conditional", "names_version", "expected"),
    [
        ("PutObject", 412, "PreconditionFailed", True, False, PreconditionFailed),
        ("PutObject", 412, "412", True, True, PreconditionFailed),
        ("PutObject", 200, "PreconditionFailed", True, True, PreconditionFailed),
        ("PutObject", 404, "NoSuchKey", True, True, PreconditionFailed),
        ("DeleteObject", 404, "404", True, True, PreconditionFailed),
        ("GetObject", 404, "NoSuchKey", False, False, NotFound),
        ("HeadObject", 404, "404", False, False, NotFound),
        ("PutObject", 409, "ConditionalRequestConflict", True, False, Conflict),
        ("PutObject", 409, "OperationAborted", True, True, Conflict),
        ("DeleteObject", 409, "409", True, True, Conflict),
        ("PutObject", 501, "NotImplemented", True, False, StoreUnsupported),
    ],
)
def test_answers(
    operation: str, status: int, code: str, conditional: bool, names_version: bool, expected: type[Exception]
) -> None:
    """Outcomes are told by the code as well as by the status, and carry key and date."""
    error = classify(_failure(operation, status, code, conditional=conditional, names_version=names_version))
    assert type(error) is expected
    if isinstance(error, PreconditionFailed | Conflict | NotFound):
        assert (error.key, error.date_s) == ("the/key", 5.0)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (503, "SlowDownWrite"),
        (200, "SlowDown"),
        (429, "429"),
        (429, "ServiceUnavailable"),
        (400, "RequestLimitExceeded"),
        (400, "ThrottlingException"),
        (400, "Throttling"),
        (503, "TooManyRequests"),
        (503, "ErrTooManyRequest"),
        (509, "BandwidthLimitExceeded"),
    ],
)
def test_throttled(status: int, code: str) -> None:
    """Everything that asks for fewer requests is Throttled, with what Retry-After said."""
    error = classify(_failure("PutObject", status, code, conditional=True))
    assert isinstance(error, Throttled)
    assert error.retriable
    assert error.retry_after_s == 7.0


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "NoSuchBucket", "bucket 'the-bucket' does not exist.*Create the bucket"),
        (403, "AccessDenied", "Access denied to PutObject on bucket 'the-bucket'.*s3:PutObject"),
        (403, "InvalidAccessKeyId", "refused the credentials.*AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "refused the credentials"),
        (400, "ExpiredToken", "refused the credentials"),
        (403, "RequestTimeTooSkewed", "clock"),
        (301, "PermanentRedirect", "another region.*region="),
        (400, "KeyTooLongError", "PutObject -> 400 KeyTooLongError .what it said."),
        (400, "TooManyBuckets", "TooManyBuckets"),
        (409, "InvalidBucketState", "InvalidBucketState"),
    ],
)
def test_lasting_trouble(status: int, code: str, message: str) -> None:
    """What time does not cure is not retriable, and says what is wrong and what to do."""
    error = classify(_failure("PutObject", status, code, conditional=True, names_version=True))
    assert isinstance(error, StoreUnavailable)
    assert not error.retriable
    with pytest.raises(StoreUnavailable, match=message):
        raise error


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (200, "InternalError"),
        (503, "ServiceUnavailable"),
        (502, ""),
        (400, "RequestTimeout"),
        (400, "IncompleteBody"),
    ],
)
def test_passing_trouble(status: int, code: str) -> None:
    """Failures of the store itself are retriable, whatever their status."""
    error = classify(_failure("GetObject", status, code))
    assert isinstance(error, StoreUnavailable)
    assert error.retriable
