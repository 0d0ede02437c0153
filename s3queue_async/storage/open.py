"""From a queue's url to its storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from s3queue_async.errors import InvalidURL
from s3queue_async.storage.base import Storage
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.sqlite import SqliteStorage

_Converter = Callable[[str], Any]


def storage_from_url(url: str) -> Storage:
    """Make the storage that a url names; nothing is opened yet.

    - ``s3://bucket/prefix`` with ``endpoint_url``, ``region``, ``addressing`` (auto, path, virtual), ``profile``,
      ``max_connections``, ``connect_timeout`` and ``read_timeout`` (seconds), ``verify`` (true, false, or the
      path of a bundle of certificate authorities).
    - ``s3+obstore://bucket/prefix`` with the same parameters: a third of the CPU; needs the extra ``obstore``.
    - ``sqlite:///absolute/queue.db``, or ``sqlite:relative/queue.db`` and ``sqlite://relative/queue.db``, with
      ``name``, ``synchronous`` (normal, full) and ``busy_timeout`` (seconds). Unlike SQLAlchemy's urls, three
      slashes begin an absolute path; four mean the same.
    - ``memory://name``, shared inside one process; ``memory://`` for one of its own.

    Raises:
        InvalidURL: Names what is wrong and what could be there instead.
    """
    scheme, colon, rest = url.partition(":")
    make = _SCHEMES.get(scheme.lower())
    if not colon or make is None:
        choices = ", ".join(f"{known}:" for known in _SCHEMES)
        raise InvalidURL(f"{_shown(url)}: unknown scheme {scheme!r}; it must be one of {choices}.")
    if "#" in url:
        raise InvalidURL(
            f"{_shown(url)}: '#' begins a fragment, which has no meaning here; write %23 for the character."
        )
    path, _, query = rest.partition("?")
    return make(url, path, query)


def _s3(url: str, path: str, query: str) -> Storage:
    # Here, so that a queue on SQLite does not spend half a second on importing the S3 client.
    from s3queue_async.storage.s3 import S3Storage

    bucket, prefix, options = _bucket(url, path, query)
    return S3Storage(bucket, prefix, **options)


def _s3_obstore(url: str, path: str, query: str) -> Storage:
    bucket, prefix, options = _bucket(url, path, query)
    try:
        from s3queue_async.storage.s3_obstore import ObstoreStorage
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise InvalidURL(
            f"{_shown(url)}: obstore is not installed.",
            suggestion="Run: pip install 's3queue-async[obstore]', or use the same url with s3://.",
        ) from error
    return ObstoreStorage(bucket, prefix, **options)


def _bucket(url: str, path: str, query: str) -> tuple[str, str, dict[str, Any]]:
    """The bucket, the prefix and the options of an S3 url."""
    if "@" in path.removeprefix("//").partition("/")[0]:
        raise InvalidURL(
            f"{_shown(url)}: credentials do not belong into the url.",
            suggestion="Use the AWS credential chain: environment variables, a profile or a role.",
        )
    bucket, _, prefix = path.removeprefix("//").partition("/")
    if not path.startswith("//") or not bucket:
        scheme = url.partition(":")[0].lower()
        raise InvalidURL(f"{_shown(url)}: the bucket is missing; write {scheme}://bucket/prefix.")
    options = _options(url, query, _S3_OPTIONS)
    endpoint_url = options.get("endpoint_url")
    if endpoint_url is not None:
        parts = urlsplit(endpoint_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidURL(f"{_shown(url)}: endpoint_url={endpoint_url!r} must begin with http:// or https://.")
    return bucket, unquote(prefix), options


def _sqlite(url: str, path: str, query: str) -> Storage:
    if path.startswith("//"):
        path = path[2:]
        if path.startswith("//"):
            path = path[1:]
    path = unquote(path)
    if not path or path.endswith("/") or "\0" in path:
        raise InvalidURL(
            f"{_shown(url)}: the file is missing; write sqlite:///path/queue.db (absolute) or sqlite:queue.db."
        )
    return SqliteStorage(path, **_options(url, query, _SQLITE_OPTIONS))


def _memory(url: str, path: str, query: str) -> Storage:
    _options(url, query, {})
    return MemoryStorage(unquote(path.removeprefix("//").strip("/")) or None)


def _options(url: str, query: str, known: Mapping[str, tuple[str, _Converter]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            choices = f"it must be one of {', '.join(known)}" if known else "this scheme has none"
            raise InvalidURL(f"{_shown(url)}: unknown parameter {name!r}; {choices}.")
        argument, convert = known[name]
        if argument in options:
            raise InvalidURL(f"{_shown(url)}: the parameter {name!r} is there twice.")
        try:
            options[argument] = convert(text)
        except ValueError as error:
            raise InvalidURL(f"{_shown(url)}: {name}={text!r} must be {error}.") from None
    return options


def _shown(url: str) -> str:
    """The url without what might be a secret."""
    head, at, tail = url.partition("@")
    scheme, separator, _ = head.partition("//")
    return f"{scheme}//***@{tail}" if at and separator and "/" not in head.partition("//")[2] else url


def _text(text: str) -> str:
    if not text:
        raise ValueError("a text of one character or more")
    return text


def _choice(*choices: str) -> _Converter:
    def convert(text: str) -> str:
        for choice in choices:
            if text.lower() == choice.lower():
                return choice
        raise ValueError(f"one of {', '.join(choice.lower() for choice in choices)}")

    return convert


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise ValueError("a whole number from 1 to 10000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise ValueError("a number of seconds above 0, up to 3600")
    return value


def _verify(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), _text(text))


_SCHEMES: dict[str, Callable[[str, str, str], Storage]] = {
    "s3": _s3,
    "s3+obstore": _s3_obstore,
    "sqlite": _sqlite,
    "memory": _memory,
}
_S3_OPTIONS: dict[str, tuple[str, _Converter]] = {
    "endpoint_url": ("endpoint_url", _text),
    "region": ("region", _text),
    "addressing": ("addressing", _choice("auto", "path", "virtual")),
    "profile": ("profile", _text),
    "max_connections": ("max_connections", _count),
    "connect_timeout": ("connect_timeout_s", _seconds),
    "read_timeout": ("read_timeout_s", _seconds),
    "verify": ("verify", _verify),
}
_SQLITE_OPTIONS: dict[str, tuple[str, _Converter]] = {
    "name": ("name", _text),
    "synchronous": ("synchronous", _choice("NORMAL", "FULL")),
    "busy_timeout": ("busy_timeout_s", _seconds),
}
