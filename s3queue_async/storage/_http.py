"""The HTTP session of the S3 clients: one request, tried once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

from aiobotocore.httpsession import AIOHTTPSession
from aiohttp import ClientResponseError, ClientSession, ClientSSLError
from botocore.exceptions import HTTPClientError, SSLError
from yarl import URL


@dataclass(frozen=True, slots=True)
class Reply:
    """A store's whole answer; names of headers are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class SingleTrySession(AIOHTTPSession):
    """The HTTP session of aiobotocore without aiohttp's own retry.

    aiohttp sends a PUT or DELETE again by itself when a kept-alive connection turns out to be closed (issues
    7297 and 10790 there). A conditional write that was sent twice answers 412 to its own success.
    """

    async def _get_session(self, proxy_url: str | None) -> ClientSession:
        session: ClientSession = await super()._get_session(proxy_url)  # type: ignore[misc] # not in its stubs
        session._retry_connection = False
        return session

    async def exchange(self, method: str, url: str, headers: Mapping[str, str], body: bytes | BytesIO | None) -> Reply:
        """Send a signed request as it is, and read the answer whole.

        Connections, certificates and proxies are aiobotocore's; what it does for each request besides is left out.

        Args:
            method: Such as PUT.
            url: Encoded and signed.
            headers: What goes out besides what HTTP itself needs.
            body: What is sent; None for nothing.

        Raises:
            SSLError, HTTPClientError: botocore's own. No error shows the url, because its signature is a secret.
            aiohttp.ClientError, OSError, TimeoutError: There is no answer, or only a part of one.
        """
        proxies = self._proxy_config  # type: ignore[attr-defined] # not in its stubs
        proxy_url = proxies.proxy_url_for(url)
        session = await self._get_session(proxy_url)
        try:
            async with session.request(
                method,
                URL(url, encoded=True),
                headers=headers,
                data=body,
                proxy=proxy_url,
                proxy_headers=proxies.proxy_headers_for(url),
            ) as reply:
                return Reply(reply.status, reply.headers, await reply.read())
        except ClientSSLError as error:
            raise SSLError(endpoint_url=url.partition("?")[0], error=error) from error
        except ClientResponseError as error:
            # The only one of aiohttp's errors whose text has the url.
            raise HTTPClientError(error=f"{error.status} {error.message}") from None
