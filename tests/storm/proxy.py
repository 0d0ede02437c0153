"""A TCP proxy on loopback that does to a process's requests what networks do to them.

It knows no HTTP: what a client sends while no reply is outstanding begins a request, and what the server sends then
is its reply (S3 clients do not pipeline). So a reply that arrives proves that its request was applied, and swallowing
it is the case that a client cannot tell from a request that never arrived.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

import anyio
from anyio.abc import TaskGroup

HOST = "127.0.0.1"
CHUNK = 65536
ANSWERED_WITHIN_S = 30.0
"""How long a request whose client has gone may take: the server would give up what it does if we left, too."""


class Toxic(StrEnum):
    """What may happen to one request and its reply; ``REFUSED`` happens to a connection."""

    SLOW_REQUEST = "request delayed"
    LATE_REQUEST = "request delivered late"
    CUT_REQUEST = "cut in the middle of a request"
    SLOW_REPLY = "reply delayed"
    CUT_REPLY = "cut in the middle of a reply"
    LOST_REPLY = "reply lost, connection closed"
    HUNG_REPLY = "reply lost, connection hangs"
    REFUSED = "connection refused"


class Cut(StrEnum):
    """The two ways in which a process is cut off: nothing comes back, or every connection is refused."""

    SILENT = "silent"
    REFUSING = "refusing"


@dataclass
class Toxics:
    """How often what happens, as a part of all requests (or connections), and how long it lasts.

    A request that is late is delivered even if its client has given it up meanwhile.
    """

    parts: Mapping[Toxic, float] = field(default_factory=dict)
    slow_s: tuple[float, float] = (0.01, 0.5)
    late_s: tuple[float, float] = (1.0, 12.0)

    def draw(self, rng: Random) -> Toxic | None:
        """What happens to one request."""
        chance = rng.random()
        for toxic, part in self.parts.items():
            if toxic is Toxic.REFUSED:
                continue
            chance -= part
            if chance < 0:
                return toxic
        return None


class Proxy:
    """Everything between the processes and one server; its connections live in the caller's task group."""

    def __init__(self, port: int, toxics: Toxics, *, rng: Random, group: TaskGroup) -> None:
        self.server_port = port
        self.toxics = toxics
        self.rng = rng
        self.group = group
        self.counts: Counter[Toxic] = Counter()

    def calm(self) -> None:
        """Nothing happens to requests from now on."""
        self.toxics = Toxics()

    @asynccontextmanager
    async def link(self) -> AsyncIterator[Link]:
        """A port for one process. Requests under way may outlive it, as they do the process that sent them."""
        link = Link(self)
        server = await asyncio.start_server(link.accept, HOST, 0)
        link.port = server.sockets[0].getsockname()[1]
        try:
            yield link
        finally:
            server.close()


class Link:
    """One process's way to the server."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.port = 0
        self.connections: set[_Connection] = set()
        self._cut: Cut | None = None
        self._mended = anyio.Event()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy = self.proxy
        refused = proxy.rng.random() < proxy.toxics.parts.get(Toxic.REFUSED, 0.0)
        proxy.counts[Toxic.REFUSED] += refused
        if refused or self._cut is Cut.REFUSING:
            writer.transport.abort()
        else:
            proxy.group.start_soon(_Connection(self, reader, writer).run)

    def cut(self, how: Cut) -> None:
        """Cut the process off until ``mend``."""
        self._cut = how
        self._mended = anyio.Event()
        if how is Cut.REFUSING:
            for connection in list(self.connections):
                connection.abort()

    def mend(self) -> None:
        """End a cut; what was under way goes on, as a network would send it again."""
        self._cut = None
        self._mended.set()

    async def passable(self) -> bool:
        """Wait while nothing gets through; says whether there was anything to wait for."""
        waited = False
        while self._cut is Cut.SILENT:
            waited = True
            await self._mended.wait()
        return waited


class _Connection:
    """One connection of a client, and the one to the server that was opened for it."""

    def __init__(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._link = link
        self._proxy = link.proxy
        self._from_client, self._to_client = reader, writer
        self._scope = anyio.CancelScope()
        self._toxic: Toxic | None = None
        self._asked = False
        self._answered = anyio.Event()
        self._outlives_client = False

    async def run(self) -> None:
        """Carry bytes both ways until either side ends."""
        self._link.connections.add(self)
        to_server: asyncio.StreamWriter | None = None
        try:
            with self._scope:
                await self._link.passable()
                from_server, to_server = await asyncio.open_connection(HOST, self._proxy.server_port)
                async with anyio.create_task_group() as pumps:
                    pumps.start_soon(self._requests, to_server)
                    pumps.start_soon(self._replies, from_server)
        except* OSError:
            # Either side may leave at any time; the other one is told by the end of its connection.
            self._scope.cancel()
        finally:
            self._link.connections.discard(self)
            for writer in (self._to_client, to_server):
                if writer is not None:
                    writer.close()

    def abort(self) -> None:
        """End it at once, with what is in flight."""
        self._to_client.transport.abort()
        self._scope.cancel()

    # -- requests ------------------------------------------------------------------------------------------------

    async def _requests(self, to_server: asyncio.StreamWriter) -> None:
        while data := await self._from_client.read(CHUNK):
            if not self._asked:
                self._begin()
                data = await self._hold(data)
            if await self._link.passable():
                self._outlives_client = True
            to_server.write(data)
            await to_server.drain()
            if self._toxic is Toxic.CUT_REQUEST:
                self.abort()
        if self._asked and self._outlives_client:
            with anyio.move_on_after(ANSWERED_WITHIN_S):
                await self._answered.wait()
        self._scope.cancel()

    def _begin(self) -> None:
        self._asked = True
        self._answered = anyio.Event()
        self._toxic = self._proxy.toxics.draw(self._proxy.rng)
        self._outlives_client = self._toxic is Toxic.LATE_REQUEST
        if self._toxic is not None:
            self._proxy.counts[self._toxic] += 1

    async def _hold(self, data: bytes) -> bytes:
        """What is to be sent of a request's beginning, once it is time."""
        rng, toxics = self._proxy.rng, self._proxy.toxics
        if self._toxic is Toxic.SLOW_REQUEST:
            await anyio.sleep(rng.uniform(*toxics.slow_s))
        elif self._toxic is Toxic.LATE_REQUEST:
            await anyio.sleep(rng.uniform(*toxics.late_s))
        return self._part(data) if self._toxic is Toxic.CUT_REQUEST else data

    def _part(self, data: bytes) -> bytes:
        return data[: self._proxy.rng.randrange(1, max(2, len(data)))]

    # -- replies -------------------------------------------------------------------------------------------------

    async def _replies(self, from_server: asyncio.StreamReader) -> None:
        swallow = False
        while data := await from_server.read(CHUNK):
            if self._asked:
                self._asked = False
                swallow = self._toxic is Toxic.HUNG_REPLY
                self._answered.set()
                if self._toxic is Toxic.LOST_REPLY:
                    self.abort()
                    return
                if self._toxic is Toxic.SLOW_REPLY:
                    await anyio.sleep(self._proxy.rng.uniform(*self._proxy.toxics.slow_s))
            if swallow:
                continue
            cut = self._toxic is Toxic.CUT_REPLY
            await self._link.passable()
            self._to_client.write(self._part(data) if cut else data)
            await self._to_client.drain()
            if cut:
                # Not aborted: what was sent has to arrive.
                break
        self._scope.cancel()
