"""Reads messages from arguments, files and pipes: line by line, however long the input is."""

from __future__ import annotations

import codecs
import csv
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import PurePath
from typing import Any, Literal

import anyio
import anyio.to_thread
import click

PIECE_BYTES = 1 << 18
RECORD_BYTES_MAX = 1 << 30
Format = Literal["auto", "json", "text", "csv"]
SUFFIXES: dict[str, Format] = {".csv": "csv", ".txt": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json"}


class Input:
    """One input of lines.

    Args:
        path: The file; ``-`` for stdin.
        kind: How a line becomes a payload; ``auto``: by the name's suffix, JSON for others.
    """

    def __init__(self, path: str, kind: Format) -> None:
        self.path = path
        self.name = "stdin" if path == "-" else path
        suffix = PurePath(path).suffix.lower()
        self.kind: Format = SUFFIXES.get(suffix, "json") if kind == "auto" else kind
        self.size: int | None = None
        self.read = 0
        self._header: list[str] | None = None

    async def batches(self) -> AsyncIterator[list[tuple[int, Any]]]:
        """Payloads with the numbers of their lines, as many at a time as can be read at once.

        Raises:
            click.ClickException: A line is not of the kind; says which.
        """
        rest = ""
        number = 0
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        async for piece in self._pieces():
            self.read += len(piece)
            rest += self._decode(decoder, piece)
            lines = rest.split("\n")
            rest = lines.pop()
            if len(rest) > RECORD_BYTES_MAX:
                raise self._wrong(number + 1, f"is longer than {RECORD_BYTES_MAX:,} bytes")
            whole, number, rest = self._records(lines, rest, number)
            if whole:
                yield [found for line, text in whole for found in self._payloads(line, text)]
        rest += self._decode(decoder, b"", final=True)
        if rest.strip():
            yield self._payloads(number + 1, rest)

    def _decode(self, decoder: codecs.IncrementalDecoder, piece: bytes, *, final: bool = False) -> str:
        try:
            return decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            raise click.ClickException(f"{self.name} is not UTF-8 ({error.reason}).") from error

    def _records(self, lines: list[str], rest: str, number: int) -> tuple[list[tuple[int, str]], int, str]:
        """Whole records of these lines, the number of the last line used, and what is left for later."""
        records: list[tuple[int, str]] = []
        held: list[str] = []
        quotes = 0
        for line in lines:
            held.append(line)
            quotes += line.count('"') if self.kind == "csv" else 0
            if quotes % 2:
                # A line break inside of a quoted field.
                continue
            text = "\n".join(held)
            if text.strip():
                records.append((number + 1, text))
            number += len(held)
            held, quotes = [], 0
        return records, number, "\n".join([*held, rest]) if held else rest

    def _payloads(self, line: int, text: str) -> list[tuple[int, Any]]:
        text = text.removesuffix("\r")
        match self.kind:
            case "text":
                return [(line, text)]
            case "csv":
                return self._row(line, text)
        try:
            return [(line, json.loads(text, parse_constant=_no_constant))]
        except ValueError as error:
            raise self._wrong(line, f"is no JSON ({error}); --format text takes lines as they are") from error

    def _row(self, line: int, text: str) -> list[tuple[int, Any]]:
        try:
            (row,) = (
                csv.reader([text], strict=True) if "\n" not in text else csv.reader(text.splitlines(True), strict=True)
            )
        except (csv.Error, ValueError) as error:
            raise self._wrong(line, f"is no row of CSV ({error})") from error
        if self._header is None:
            if len(set(row)) < len(row):
                raise self._wrong(line, "names a column twice")
            self._header = row
            return []
        if len(row) != len(self._header):
            raise self._wrong(line, f"has {len(row)} fields, the first line {len(self._header)}")
        return [(line, dict(zip(self._header, row, strict=True)))]

    def _wrong(self, line: int, what: str) -> click.ClickException:
        return click.ClickException(f"{self.name}, line {line:,}, {what}.")

    async def _pieces(self) -> AsyncIterator[bytes]:
        descriptor = 0 if self.path == "-" else os.open(self.path, os.O_RDONLY)
        try:
            found = os.fstat(descriptor)
            regular = stat.S_ISREG(found.st_mode)
            self.size = found.st_size if regular else None
            while True:
                if regular:
                    piece = await anyio.to_thread.run_sync(os.read, descriptor, PIECE_BYTES)
                else:
                    await _readable(descriptor)
                    piece = os.read(descriptor, PIECE_BYTES)
                if not piece:
                    return
                yield piece
        finally:
            if descriptor:
                os.close(descriptor)


async def _readable(descriptor: int) -> None:
    try:
        await anyio.wait_readable(descriptor)
    except PermissionError:
        # What the system cannot wait for, such as /dev/null, can be read at once.
        return


def argument_payload(text: str, kind: Format) -> Any:
    """The payload that an argument of the command line means: JSON where it is JSON, text otherwise."""
    if kind == "text":
        return text
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        if kind == "json":
            raise click.ClickException(f"{text!r} is no JSON ({error}).") from error
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
