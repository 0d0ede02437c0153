"""A store in an S3 bucket, or in anything that speaks S3 and keeps conditional writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import anyio
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from aiohttp import ClientError as TransportError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    TokenRetrievalError,
)
from botocore.handlers import add_expect_header, convert_body_to_file_like_object
from botocore.parsers import ResponseParserError
from botocore.useragent import sanitize_user_agent_string_component
from botocore.utils import parse_timestamp

from s3queue_async.errors import QueueError, StoreUnavailable, StoreUnsupported
from s3queue_async.storage._http import SingleTrySession
from s3queue_async.storage._s3_bucket import examine_bucket
from s3queue_async.storage._s3_errors import Failure, classify
from s3queue_async.storage._s3_replies import Unreadable, date_s, listing_of, retry_after_s
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    IfAbsent,
    IfVersion,
    Page,
    Stored,
    Unmodified,
    Written,
)
from s3queue_async.storage.examine import BucketReport

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

AddressingStyle = Literal["auto", "path", "virtual"]

# aiohttp warns of larger bodies that are not streams, because one would be copied in a single step.
RAW_BYTES_MAX = 1024 * 1024
# Single deletes in flight when the store has no DeleteObjects.
_DELETES_IN_FLIGHT = 16
# What stores without DeleteObjects (or without its newer checksums) answer to it.
_NO_DELETE_OBJECTS = frozenset({"NotImplemented", "MethodNotAllowed", "MissingContentMD5", "501", "405"})
# Where a reply keeps the body of a listing.
_LISTING = "s3queue_async.listing"
_CREDENTIALS_ERRORS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError)


class S3Storage:
    """A storage under a prefix of an S3 bucket.

    One client with one pool of connections lives from ``open`` to ``close``. Each call is one request, tried once:
    the retries of botocore and of aiohttp are both off, because only the caller can tell what a lost reply means.
    (Two exceptions, neither of which writes twice: botocore follows a redirect to the bucket's region, and a read
    of bytes past an object's end, which S3 answers with an error that does not name the version, asks again.)

    Credentials come by the usual AWS chain (environment, profile, role) unless they are given.

    Args:
        bucket: The bucket; it must exist.
        prefix: What all keys start with, without the slash that follows it; "" for the whole bucket.
        endpoint_url: The store's URL; None for AWS.
        region: The bucket's region; None leaves it to the AWS configuration.
        addressing: Whether the bucket's name goes into the path or the host name; "auto" lets botocore choose.
        max_connections: Requests in flight at once; more wait for a connection.
        connect_timeout_s: How long to wait for a connection, in seconds.
        read_timeout_s: How long to wait for each piece of a reply, in seconds.
        profile: A profile of the AWS configuration.
        access_key_id: Half of explicit credentials; for tests and tools.
        secret_access_key: The other half.
        session_token: What temporary credentials need besides.
        verify: False to accept any TLS certificate, or the path of a bundle of authorities.
    """

    _signature_version: ClassVar[str | None] = None

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        addressing: AddressingStyle = "auto",
        max_connections: int = 64,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 20.0,
        profile: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        session_token: str | None = None,
        verify: bool | str | None = None,
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.endpoint_url = endpoint_url
        self._root = f"{self.prefix}/" if self.prefix else ""
        self._profile = profile
        self._client_args: dict[str, Any] = {
            "endpoint_url": endpoint_url,
            "region_name": region,
            "aws_access_key_id": access_key_id,
            "aws_secret_access_key": secret_access_key,
            "aws_session_token": session_token,
            "verify": verify,
        }
        self._config_args: dict[str, Any] = {
            "s3": {"addressing_style": addressing},
            "max_pool_connections": max_connections,
            "connect_timeout": connect_timeout_s,
            "read_timeout": read_timeout_s,
        }
        self._user_agent = ""
        self._client: S3Client | None = None
        self._exit_stack = AsyncExitStack()
        self._has_delete_objects = True

    def __repr__(self) -> str:
        where = f" at {self.endpoint_url}" if self.endpoint_url else ""
        return f"<S3Storage s3://{self.bucket}/{self.prefix}{where}>"

    @property
    def date_resolution_s(self) -> float:
        """HTTP dates are whole seconds."""
        return 1.0

    async def open(self) -> None:
        """Make the client and look once whether the bucket can be listed; see Storage.open."""
        if self._client is not None:
            return
        await self.connect()
        try:
            await self.list("", limit=1)
        except BaseException:
            await self.close()
            raise

    async def connect(self) -> None:
        """Make the client, and ask the store nothing; for who wants to find out what is wrong with it."""
        if self._client is not None:
            return
        # The stubs know classes only.
        new_http: Any = self._new_http
        async with AsyncExitStack() as stack:
            try:
                session = AioSession(profile=self._profile)
                self._user_agent = _user_agent(session)
                config = AioConfig(
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    # Newer checksums are unknown to many stores; DeleteObjects, which requires one, still carries it.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    # Every parameter is made here, so checking each costs time for nothing.
                    parameter_validation=False,
                    http_session_cls=new_http,
                    signature_version=self._signature_version,
                    # botocore makes its own anew for each request, twice: an eighth of what a PUT takes of the CPU.
                    user_agent=self._user_agent,
                    **self._config_args,
                )
                # The client would add it to what already has it.
                session.user_agent_extra = ""
                # botocore makes a stream of every body, and asks for leave to send a stream (Expect: 100-continue):
                # one more round trip for each PUT. Besides, SeaweedFS 4.48 stores an empty object when a request
                # is cut off in between. Without both, a body goes out together with its headers.
                session.unregister("before-parameter-build.s3.PutObject", _TO_STREAM)
                session.unregister("before-call.s3", _ASK_FIRST)
                session.register("before-parse.s3.ListObjectsV2", _keep_listing)
                session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
                context = session.create_client("s3", config=config, **self._client_args)
                client = await stack.enter_async_context(context)
                await self._connected(session, client)
            except (BotoCoreError, ValueError) as error:
                raise self._translate(error, "Connect", "") from error
            self._client = client
            self._exit_stack = stack.pop_all()

    async def _connected(self, session: AioSession, client: S3Client) -> None:
        """Called when there is a client, before anything is asked of the store."""

    def _new_http(self, **args: Any) -> SingleTrySession:
        self._http = SingleTrySession(**args)
        return self._http

    async def close(self) -> None:
        """Close all connections. Calling it twice is fine."""
        self._client = None
        await self._exit_stack.aclose()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        args: dict[str, Any] = {"Bucket": self.bucket, "Key": self._root + key}
        if span is not None:
            args["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
        if unless is not None:
            args["IfNoneMatch"] = unless
        client = self._opened()
        try:
            reply = await client.get_object(**args)
            # Read whole, always: a body that is left unread costs its connection.
            async with reply["Body"] as stream:
                body = await stream.read()
        except ClientError as error:
            status, code = _status_and_code(error)
            if status == 304:
                return Unmodified(_date_s(error.response))
            if status == 416 or code == "InvalidRange":
                return await self._get_nothing(key)
            raise self._translate(error, "GetObject", key) from error
        except FOREIGN_ERRORS as error:
            raise self._translate(error, "GetObject", key) from error
        return Stored(key, body, reply["ETag"], reply["LastModified"].timestamp(), _date_s(reply))

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        sent = body if len(body) <= RAW_BYTES_MAX else BytesIO(body)
        args: dict[str, Any] = {"Bucket": self.bucket, "Key": self._root + key, "Body": sent}
        match when:
            case IfAbsent():
                args["IfNoneMatch"] = "*"
            case IfVersion(version):
                args["IfMatch"] = version
            case None:
                pass
        client = self._opened()
        try:
            reply = await client.put_object(**args)
        except FOREIGN_ERRORS as error:
            raise self._translate(error, "PutObject", key, when=when) from error
        version = reply.get("ETag")
        if not version:
            raise StoreUnsupported("The store answers a PUT without an ETag, so its objects have no versions.")
        return Written(version, _date_s(reply))

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        args: dict[str, Any] = {"Bucket": self.bucket, "Key": self._root + key}
        if when is not None:
            args["IfMatch"] = when.version
        client = self._opened()
        try:
            reply = await client.delete_object(**args)
        except FOREIGN_ERRORS as error:
            if when is None and isinstance(error, ClientError) and _status_and_code(error)[1] == "NoSuchKey":
                return Deleted(_date_s(error.response))
            raise self._translate(error, "DeleteObject", key, when=when) from error
        return Deleted(_date_s(reply))

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects, in one request where the store can; see Storage.delete_many."""
        if not keys:
            return Deleted(None)
        if not self._has_delete_objects:
            return await self._delete_each(keys)
        client = self._opened()
        objects: Any = [{"Key": self._root + key} for key in keys]
        try:
            reply = await client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
        except FOREIGN_ERRORS as error:
            if isinstance(error, ClientError) and not _NO_DELETE_OBJECTS.isdisjoint(map(str, _status_and_code(error))):
                self._has_delete_objects = False
                return await self._delete_each(keys)
            raise self._translate(error, "DeleteObjects", "") from error
        for failed in reply.get("Errors", ()):
            if failed.get("Code") != "NoSuchKey":
                raise classify(
                    Failure(
                        operation="DeleteObjects",
                        bucket=self.bucket,
                        key=failed.get("Key", "").removeprefix(self._root),
                        status=200,
                        code=failed.get("Code", ""),
                        message=f"{failed.get('Message', '')}: {failed.get('Key', '')}",
                        date_s=_date_s(reply),
                    )
                )
        return Deleted(_date_s(reply))

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        client = self._opened()
        try:
            reply: Any = await client.list_objects_v2(**self._list_args(prefix, after, limit))
        except FOREIGN_ERRORS as error:
            raise self._translate(error, "ListObjectsV2", prefix) from error
        return self._page(prefix, reply.get(_LISTING, b""), _date_s(reply))

    def _list_args(self, prefix: str, after: str, limit: int) -> dict[str, Any]:
        args: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self._root + prefix, "MaxKeys": limit}
        if after:
            args["StartAfter"] = self._root + after
        return args

    def _page(self, prefix: str, body: bytes, answered_s: float | None) -> Page:
        try:
            entries, more = listing_of(body, skip=len(self._root))
        except Unreadable as error:
            raise StoreUnavailable(f"The store answered ListObjectsV2 with what is no listing: {error}.") from error
        if more and not entries:
            # Nothing to go on from: a caller would ask for the same page for ever.
            raise StoreUnavailable(
                f"The store answered ListObjectsV2 of {prefix!r} with an empty page, but more to come."
            )
        return Page(entries, more, answered_s)

    async def _get_nothing(self, key: str) -> Stored:
        """Read the version of an object that ends before the bytes that were asked for."""
        try:
            reply = await self._opened().head_object(Bucket=self.bucket, Key=self._root + key)
        except FOREIGN_ERRORS as error:
            raise self._translate(error, "HeadObject", key) from error
        return Stored(key, b"", reply["ETag"], reply["LastModified"].timestamp(), _date_s(reply))

    async def _delete_each(self, keys: Sequence[str]) -> Deleted:
        limiter = anyio.CapacityLimiter(_DELETES_IN_FLIGHT)
        dates: list[float] = []
        errors: list[QueueError] = []

        async def delete(key: str) -> None:
            async with limiter:
                try:
                    deleted = await self.delete(key)
                except QueueError as error:
                    errors.append(error)
                else:
                    dates.append(deleted.date_s or 0.0)

        async with anyio.create_task_group() as group:
            for key in keys:
                group.start_soon(delete, key)
        if errors:
            raise errors[0]
        return Deleted(max(dates) or None)

    async def examine(self) -> BucketReport:
        """What the bucket is set up for; see Examinable."""
        return await examine_bucket(
            self._opened(), self.bucket, self._root, lambda error, operation: self._translate(error, operation, "")
        )

    def _opened(self) -> S3Client:
        if self._client is None:
            raise StoreUnavailable(
                f"{self!r} is not open.", retriable=False, suggestion="Call open() first, and no more after close()."
            )
        return self._client

    def _translate(
        self, error: BaseException, operation: str, key: str, *, when: Condition | None = None
    ) -> QueueError:
        if isinstance(error, ClientError):
            status, code = _status_and_code(error)
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            return classify(
                Failure(
                    operation=operation,
                    bucket=self.bucket,
                    key=key,
                    status=status,
                    code=code,
                    message=error.response.get("Error", {}).get("Message", ""),
                    date_s=_date_s(error.response),
                    retry_after_s=retry_after_s(headers.get("retry-after")),
                    conditional=when is not None,
                    names_version=isinstance(when, IfVersion),
                )
            )
        if isinstance(error, _CREDENTIALS_ERRORS):
            return StoreUnavailable(
                f"There are no usable AWS credentials: {error}.",
                retriable=False,
                suggestion="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or configure a profile or a role.",
            )
        if isinstance(error, ParamValidationError | ProfileNotFound | SSLError | ValueError):
            return StoreUnavailable(
                f"{operation} on bucket {self.bucket!r} is not possible: {error}.",
                retriable=False,
                suggestion="Correct the url or the AWS configuration.",
            )
        return StoreUnavailable(
            f"{operation} on bucket {self.bucket!r} got no reply: {str(error) or type(error).__name__}."
        )


# The stubs know handlers of another form only.
_TO_STREAM: Any = convert_body_to_file_like_object
_ASK_FIRST: Any = add_expect_header

# Whatever aiobotocore lets through; aiohttp's and the system's own errors appear while a body is being read.
FOREIGN_ERRORS = (
    ClientError,
    BotoCoreError,
    HTTPClientError,
    ResponseParserError,
    TransportError,
    OSError,
    TimeoutError,
)


def _user_agent(session: AioSession) -> str:
    """What the store's logs say of who asked: this library, what it stands on, and the application if it has a name."""
    names = [f"s3queue-async/{metadata.version('s3queue-async')}", session.user_agent()]
    application = session.get_config_variable("user_agent_appid")
    if application:
        # It may hold anything, also what no header may.
        names.append(f"app/{sanitize_user_agent_string_component(application, allow_hash=False)}")
    return " ".join(names)


def _status_and_code(error: ClientError) -> tuple[int, str]:
    response: Any = error.response
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), response.get("Error", {}).get("Code", "")


def _date_s(reply: Any) -> float | None:
    return date_s(reply["ResponseMetadata"].get("HTTPHeaders", {}).get("date"))


def _keep_listing(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Leave a listing to ``listing_of``: botocore's own parser takes five times as long."""
    if response_dict["status_code"] == 200:
        customized_response_dict[_LISTING] = response_dict["body"]
        response_dict["body"] = b""


def _parse_timestamp(value: Any) -> datetime:
    # botocore's own parser takes dates in any form that people write, and its time.
    if isinstance(value, str) and value[3:5] == ", ":
        return parsedate_to_datetime(value)
    parsed: datetime = parse_timestamp(value)
    return parsed
