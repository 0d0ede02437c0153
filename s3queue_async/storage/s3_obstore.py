"""The S3 store at a third of the CPU: obstore signs the requests, aiohttp sends them as they are.

obstore is asked for signatures only. Its own requests would lose what the protocol stands on: their replies come
without the ``Date`` header, which is the store's time, and there is no conditional DELETE. See docs/storage.md.
"""

from __future__ import annotations

import re
from datetime import timedelta
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from obstore import sign
from obstore.exceptions import BaseError as ObstoreError
from obstore.store import S3Store

from s3queue_async.errors import StoreUnavailable, StoreUnsupported
from s3queue_async.storage._http import Reply
from s3queue_async.storage._s3_errors import Failure, classify
from s3queue_async.storage._s3_replies import date_s, error_of, retry_after_s
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
from s3queue_async.storage.s3 import FOREIGN_ERRORS, RAW_BYTES_MAX, S3Storage

if TYPE_CHECKING:
    from aiobotocore.session import AioSession
    from obstore.store import S3Credential
    from types_aiobotocore_s3.client import S3Client

# As far apart as S3 lets a client's clock be from its own when a request is signed in its headers.
_SIGNED_FOR = timedelta(minutes=15)
# obstore would refuse these keys, or sign for others: it takes slashes at the ends away.
_ODD_KEY = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f]")
_OPERATIONS: dict[str, tuple[Literal["GET", "PUT", "DELETE"], str]] = {
    "GetObject": ("GET", "get_object"),
    "PutObject": ("PUT", "put_object"),
    "DeleteObject": ("DELETE", "delete_object"),
}


class ObstoreStorage(S3Storage):
    """As S3Storage, with the same arguments, for a third of its CPU.

    GET, PUT and DELETE are signed in their url by obstore, LIST by botocore, for 15 minutes and for one operation on
    one key. The client of S3Storage finds out address and credentials (and renews these), and sends the rest:
    DeleteObjects, and the rare read past an object's end. Conditions go out as headers, and every reply is read with
    its ``Date``. Nothing is tried twice.
    """

    # botocore's older signatures in urls, its default, are unknown to newer regions and to many stores.
    _signature_version: ClassVar[str | None] = "s3v4"

    def __repr__(self) -> str:
        return super().__repr__().replace("<S3Storage s3:", "<ObstoreStorage s3+obstore:", 1)

    async def _connected(self, session: AioSession, client: S3Client) -> None:
        explicit = self._client_args["aws_access_key_id"], self._client_args["aws_secret_access_key"]
        if any(explicit):
            session.set_credentials(*explicit, self._client_args["aws_session_token"])
        client.meta.events.register("before-parameter-build.s3", _in_its_region)
        # Whatever botocore makes of region, endpoint, profile and environment is in the url that it signs.
        params = {"Bucket": self.bucket, "Key": "key"}
        url = await client.generate_presigned_url("get_object", Params=params)
        scope = re.search(r"[?&]X-Amz-Credential=[^&]*%2F\d{8}%2F([^&]+)%2Fs3%2Faws4_request", url)
        credentials = await session.get_credentials()
        if scope is None or credentials is None:
            raise StoreUnavailable(
                f"{self!r} has a configuration whose requests obstore cannot sign.",
                retriable=False,
                suggestion="Use the same url with s3:// instead.",
            )
        self._credentials = credentials
        self._signed_by: Any = None
        self._address, self._region = url.partition("?")[0].removesuffix("/key"), scope[1]
        # obstore reads the environment, too, and refuses to start on what it cannot read there.
        await self._signed("GET", "key")

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        headers: dict[str, str] = {}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
        if unless is not None:
            headers["If-None-Match"] = unless
        reply = await self._request("GetObject", key, headers)
        if reply.status == 304:
            return Unmodified(_date_s(reply))
        if reply.status == 416:
            return await self._get_nothing(key)
        self._check(reply, "GetObject", key)
        version, modified_s = reply.headers.get("ETag"), date_s(reply.headers.get("Last-Modified"))
        if not version or modified_s is None:
            raise StoreUnavailable(f"The store answered GetObject of {key!r} without an ETag or a Last-Modified.")
        return Stored(key, reply.body, version, modified_s, _date_s(reply))

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        headers = {"Content-Length": str(len(body))}
        match when:
            case IfAbsent():
                headers["If-None-Match"] = "*"
            case IfVersion(version):
                headers["If-Match"] = version
            case None:
                pass
        reply = await self._request("PutObject", key, headers, body)
        self._check(reply, "PutObject", key, when=when)
        etag = reply.headers.get("ETag")
        if not etag:
            raise StoreUnsupported("The store answers a PUT without an ETag, so its objects have no versions.")
        return Written(etag, _date_s(reply))

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        headers = {} if when is None else {"If-Match": when.version}
        reply = await self._request("DeleteObject", key, headers)
        if when is None and reply.status == 404 and error_of(reply.body)[0] == "NoSuchKey":
            return Deleted(_date_s(reply))
        self._check(reply, "DeleteObject", key, when=when)
        return Deleted(_date_s(reply))

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        operation = "ListObjectsV2"
        client = self._opened()
        try:
            url = await client.generate_presigned_url(
                "list_objects_v2",
                Params=self._list_args(prefix, after, limit),
                ExpiresIn=int(_SIGNED_FOR.total_seconds()),
            )
            reply = await self._exchange("GET", url, {}, None)
        except FOREIGN_ERRORS as error:
            raise self._translate(error, operation, prefix) from error
        self._check(reply, operation, prefix)
        return self._page(prefix, reply.body, _date_s(reply))

    async def _request(self, operation: str, key: str, headers: dict[str, str], body: bytes | None = None) -> Reply:
        method, name = _OPERATIONS[operation]
        client = self._opened()
        path = self._root + key
        try:
            if _ODD_KEY.search(path):
                url = await client.generate_presigned_url(
                    name,
                    Params={"Bucket": self.bucket, "Key": path},
                    ExpiresIn=int(_SIGNED_FOR.total_seconds()),
                )
            else:
                url = await self._signed(method, path)
            sent = body if body is None or len(body) <= RAW_BYTES_MAX else BytesIO(body)
            return await self._exchange(method, url, headers, sent)
        except FOREIGN_ERRORS as error:
            raise self._translate(error, operation, key) from error

    async def _exchange(self, method: str, url: str, headers: dict[str, str], body: bytes | BytesIO | None) -> Reply:
        return await self._http.exchange(
            method, url, {"Accept-Encoding": "identity", "User-Agent": self._user_agent, **headers}, body
        )

    async def _signed(self, method: Literal["GET", "PUT", "DELETE"], path: str) -> str:
        store = await self._signer()
        try:
            return sign(store, method, path, _SIGNED_FOR)
        except ObstoreError as error:
            raise _refused(error) from error

    async def _signer(self) -> S3Store:
        """What signs with the credentials of the moment: those of a role are renewed now and then."""
        credentials = await self._credentials.get_frozen_credentials()
        if credentials != self._signed_by:

            def current() -> S3Credential:
                return {
                    "access_key_id": credentials.access_key or "",
                    "secret_access_key": credentials.secret_key or "",
                    "token": credentials.token,
                    "expires_at": None,
                }

            # Everything that obstore would otherwise take from the environment by itself is named.
            try:
                self._store = S3Store(
                    self.bucket,
                    endpoint=self._address,
                    aws_endpoint_url_s3=self._address,
                    virtual_hosted_style_request=True,
                    region=self._region,
                    request_payer=False,
                    s3_express=False,
                    skip_signature=False,
                    client_options={"allow_http": True},
                    retry_config={"max_retries": 0},
                    credential_provider=current,
                )
            except ObstoreError as error:
                raise _refused(error) from error
            self._signed_by = credentials
        return self._store

    def _check(self, reply: Reply, operation: str, key: str, *, when: Condition | None = None) -> None:
        """Raise what a reply that is no success means; some stores send errors under status 200."""
        # Only a GET's body is not the store's own.
        if reply.status < 300 and (operation == "GetObject" or b"<Error" not in reply.body[:200]):
            return
        code, message = error_of(reply.body)
        if reply.status < 300 and not code:
            return
        if message.startswith(("Request has expired", "Request is not valid yet")):
            code = "RequestTimeTooSkewed"
        raise classify(
            Failure(
                operation=operation,
                bucket=self.bucket,
                key=key,
                status=reply.status,
                code=code or str(reply.status),
                message=message,
                date_s=_date_s(reply),
                retry_after_s=retry_after_s(reply.headers.get("Retry-After")),
                conditional=when is not None,
                names_version=isinstance(when, IfVersion),
            )
        )


def _refused(error: ObstoreError) -> StoreUnavailable:
    # The rest of the text is a dump of obstore's insides.
    reason = str(error).partition("\n")[0].rstrip(".")
    return StoreUnavailable(
        f"obstore cannot sign: {reason}.",
        retriable=False,
        suggestion="Correct the environment variable, or use the same url with s3:// instead.",
    )


def _in_its_region(context: dict[str, Any], **rest: Any) -> None:
    # Otherwise urls that botocore signs go to S3's global address, which redirects to younger buckets' regions.
    context["use_global_endpoint"] = False


def _date_s(reply: Reply) -> float | None:
    return date_s(reply.headers.get("Date"))
