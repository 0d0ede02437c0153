"""Each toxic does what it says, to a server that answers lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import anyio
import pytest

from tests.storm.proxy import HOST, Cut, Link, Proxy, Toxic, Toxics

ASKED = b"a request of some length\n"
ANSWER = b"a reply of some length\n"
WITHIN_S = 10.0
SILENCE_S = 0.05
"""How long nothing has to come; too short only lets a broken proxy pass."""


@dataclass
class Server:
    """Answers every line, and tells what came."""

    received: list[bytes] = field(default_factory=list)
    connections: int = 0
    came: anyio.Event = field(default_factory=anyio.Event)
    left: anyio.Event = field(default_factory=anyio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while data := await reader.readline():
                self.received.append(data)
                self.came.set()
                if data == ASKED:
                    writer.write(ANSWER)
                    await writer.drain()
        except ConnectionError:
            # A client that left in the middle; this server only tells that it did.
            pass
        finally:
            self.left.set()
            writer.close()


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self) -> None:
        self.writer.write(ASKED)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """All that comes until the connection ends, whichever way."""
        got = b""
        try:
            while data := await self.reader.read(4096):
                got += data
        except ConnectionError:
            return got
        return got


@asynccontextmanager
async def bed(toxic: Toxic | None = None, **options: tuple[float, float]) -> AsyncIterator[tuple[Server, Proxy, Link]]:
    """A server, and a proxy before it that does one thing to everything."""
    server = Server()
    listening = await asyncio.start_server(server.serve, HOST, 0)
    port = listening.sockets[0].getsockname()[1]
    toxics = Toxics({} if toxic is None else {toxic: 1.0}, **options)
    with anyio.fail_after(WITHIN_S):
        async with listening, anyio.create_task_group() as group:
            proxy = Proxy(port, toxics, rng=Random(1), group=group)
            async with proxy.link() as link:
                yield server, proxy, link
            group.cancel_scope.cancel()


@asynccontextmanager
async def connected(link: Link) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(HOST, link.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def is_silent(client: Client) -> bool:
    with anyio.move_on_after(SILENCE_S):
        await client.reader.read(1)
        return False
    return True


async def test_nothing_is_done() -> None:
    """Without toxics requests and replies pass, several on one connection."""
    async with bed() as (server, proxy, link), connected(link) as client:
        for _ in range(3):
            await client.ask()
            assert await client.reader.readline() == ANSWER
        assert server.received == [ASKED] * 3
        assert server.connections == 1
        assert not +proxy.counts


@pytest.mark.parametrize("toxic", [Toxic.SLOW_REQUEST, Toxic.SLOW_REPLY])
async def test_delayed(toxic: Toxic) -> None:
    """A delayed request or reply comes whole, and not before its time."""
    async with bed(toxic, slow_s=(0.1, 0.1)) as (_, proxy, link), connected(link) as client:
        began = time.monotonic()
        await client.ask()
        assert await client.reader.readline() == ANSWER
        assert time.monotonic() - began >= 0.1
        assert +proxy.counts == {toxic: 1}


async def test_late() -> None:
    """A late request is delivered although its client has gone, and the server is left time to do it."""
    async with bed(Toxic.LATE_REQUEST, late_s=(0.05, 0.05)) as (server, proxy, link):
        async with connected(link) as client:
            await client.ask()
        await server.came.wait()
        assert server.received == [ASKED]
        await server.left.wait()
        assert +proxy.counts == {Toxic.LATE_REQUEST: 1}


async def test_cut_in_the_middle_of_a_request() -> None:
    """The server gets a part of it and the end of the connection, the client gets no reply."""
    async with bed(Toxic.CUT_REQUEST) as (server, proxy, link), connected(link) as client:
        await client.ask()
        assert await client.rest() == b""
        await server.left.wait()
        [part] = server.received
        assert ASKED.startswith(part)
        assert part != ASKED
        assert +proxy.counts == {Toxic.CUT_REQUEST: 1}


async def test_cut_in_the_middle_of_a_reply() -> None:
    """The server gets the request whole, the client a part of the reply and the end of the connection."""
    async with bed(Toxic.CUT_REPLY) as (server, proxy, link), connected(link) as client:
        await client.ask()
        part = await client.rest()
        assert server.received == [ASKED]
        assert part
        assert ANSWER.startswith(part)
        assert part != ANSWER
        assert +proxy.counts == {Toxic.CUT_REPLY: 1}


async def test_reply_lost() -> None:
    """The request is delivered, the reply is not, and the connection ends."""
    async with bed(Toxic.LOST_REPLY) as (server, proxy, link), connected(link) as client:
        await client.ask()
        assert await client.rest() == b""
        assert server.received == [ASKED]
        assert +proxy.counts == {Toxic.LOST_REPLY: 1}


async def test_reply_hangs() -> None:
    """The request is delivered, the reply is not, and the connection stays open until the client leaves."""
    async with bed(Toxic.HUNG_REPLY) as (server, proxy, link):
        async with connected(link) as client:
            await client.ask()
            await server.came.wait()
            assert await is_silent(client)
            assert not server.left.is_set()
        await server.left.wait()
        assert server.received == [ASKED]
        assert +proxy.counts == {Toxic.HUNG_REPLY: 1}


async def test_refused() -> None:
    """The connection ends before anything was delivered; the server never sees it."""
    async with bed(Toxic.REFUSED) as (server, proxy, link), connected(link) as client:
        assert await client.rest() == b""
        assert server.connections == 0
        assert +proxy.counts == {Toxic.REFUSED: 1}


async def test_calm() -> None:
    """After ``calm`` nothing happens any more, on old connections either."""
    async with bed(Toxic.SLOW_REQUEST, slow_s=(0.0, 0.0)) as (_, proxy, link), connected(link) as client:
        await client.ask()
        assert await client.reader.readline() == ANSWER
        proxy.calm()
        await client.ask()
        assert await client.reader.readline() == ANSWER
        assert +proxy.counts == {Toxic.SLOW_REQUEST: 1}


async def test_silent_cut() -> None:
    """Nothing gets through on old and new connections, and no error comes; what was sent arrives after the cut."""
    async with bed() as (server, _, link), connected(link) as old:
        await old.ask()
        assert await old.reader.readline() == ANSWER
        link.cut(Cut.SILENT)
        async with connected(link) as new, connected(link) as gone:
            for client in (old, new, gone):
                await client.ask()
            assert await is_silent(new)
            assert server.received == [ASKED]
            gone.writer.close()
            link.mend()
            assert await old.reader.readline() == ANSWER
            assert await new.reader.readline() == ANSWER
            while len(server.received) < 4:
                server.came = anyio.Event()
                await server.came.wait()


async def test_refusing_cut() -> None:
    """Connections that are there end, new ones are refused; another process's are not touched; all is well after it."""
    async with bed() as (server, proxy, link), connected(link) as old, proxy.link() as other:
        await old.ask()
        assert await old.reader.readline() == ANSWER
        link.cut(Cut.REFUSING)
        assert await old.rest() == b""
        async with connected(link) as new:
            assert await new.rest() == b""
        async with connected(other) as untouched:
            await untouched.ask()
            assert await untouched.reader.readline() == ANSWER
        assert server.connections == 2
        link.mend()
        async with connected(link) as new:
            await new.ask()
            assert await new.reader.readline() == ANSWER


async def test_server_away() -> None:
    """When the server cannot be reached, the client's connection ends, and the proxy goes on."""
    async with bed() as (_, proxy, link):
        port, proxy.server_port = proxy.server_port, 1
        async with connected(link) as client:
            assert await client.rest() == b""
        proxy.server_port = port
        async with connected(link) as client:
            await client.ask()
            assert await client.reader.readline() == ANSWER
