"""A contender that is no queue: it loses and repeats as many messages as it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


class Careless:
    def __init__(self, *, lose: int, repeat: int) -> None:
        self._lose = lose
        self._repeat = repeat
        self._payloads: Sequence[bytes] = ()

    async def open(self) -> None: ...

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        self._payloads = payloads

    async def start(self, handle: Callable[[bytes], None]) -> None:
        kept = self._payloads[self._lose :]
        for payload in (*kept, *kept[: self._repeat]):
            handle(payload)

    async def finish(self) -> None: ...

    async def close(self) -> None: ...

    def requests(self) -> Mapping[str, int]:
        return {}
