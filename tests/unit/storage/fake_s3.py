"""An S3 server that answers from a list, and a storage on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from s3queue_async.storage.s3 import S3Storage

Client = type[S3Storage]

DATE = "Wed, 01 Jan 2025 00:00:07 GMT"
DATE_S = 1735689607.0
CUT = "X-Closes-Afterwards"
Reply = tuple[int, dict[str, str], bytes]
EMPTY_LIST: Reply = (200, {}, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")


def error_reply(status: int, code: str, **headers: str) -> Reply:
    return status, headers, f"<Error><Code>{code}</Code><Message>it says</Message></Error>".encode()


class FakeServer:
    """An HTTP server that answers from a list; None closes the connection instead of answering, bytes go out as is."""

    def __init__(self) -> None:
        self.replies: list[Reply | bytes | None] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.received = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((head[0], headers, body))
        self.received.set()
        reply = self.replies.pop(0)
        if reply is None or isinstance(reply, bytes):
            writer.write(reply or b"")
            await writer.drain()
            return False
        status, extra, content = reply
        lines = {"Date": DATE, "Content-Length": str(len(content)), **extra}
        writer.write(f"HTTP/1.1 {status} X\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode() + b"\r\n" + content)
        await writer.drain()
        return CUT not in extra


@asynccontextmanager
async def serving(client: Client, **options: Any) -> AsyncIterator[tuple[FakeServer, S3Storage]]:
    async with listening() as fake:
        storage = make_storage(client, fake.url, **options)
        fake.replies.append(EMPTY_LIST)
        await storage.open()
        fake.requests.clear()
        try:
            yield fake, storage
        finally:
            await storage.close()


@asynccontextmanager
async def listening() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
        await server.wait_closed()


def make_storage(client: Client, url: str, **options: Any) -> S3Storage:
    defaults: dict[str, Any] = {
        "endpoint_url": url,
        "region": "us-east-1",
        "addressing": "path",
        "access_key_id": "key",
        "secret_access_key": "secret",
    }
    return client("bucket", "root", **{**defaults, **options})
