"""Keyrings: what they take, what they refuse, and that no text of theirs shows a key."""

from __future__ import annotations

import base64
import sys
from typing import Any

import pytest

from s3queue_async import InvalidSettings, Keyring, S3Queue
from s3queue_async.settings import Settings

RAW = bytes(range(32))
TEXT = base64.b64encode(RAW).decode()
OTHER = base64.b64encode(bytes(32)).decode()


def test_keys_as_bytes_and_as_text() -> None:
    """Both are the same key; the only one is current."""
    for key in (RAW, TEXT):
        ring = Keyring({"2026-11": key})
        assert (ring.get("2026-11"), ring.get("2026-12"), ring.current, ring.ids) == (RAW, None, "2026-11", ["2026-11"])
        assert ring.accept_plaintext


def test_new_keys() -> None:
    """A new key is one that a keyring takes, and another one each time."""
    first, second = Keyring.new_key(), Keyring.new_key()
    assert first != second
    assert Keyring({"a": first, "b": second}, current="b").get("a") == base64.b64decode(first)


@pytest.mark.parametrize(
    ("keys", "current", "text"),
    [
        ({}, None, "has 0 keys"),
        ({"a": RAW, "b": RAW}, None, "current is not given"),
        ({"a": RAW}, "b", "current='b' is not in the keyring, which has: 'a'"),
        ({"a": RAW[:31]}, None, "'a' must be 32 bytes, or their base64 text; it is 31 bytes"),
        ({"a": "secret?"}, None, "a str that is not their base64"),
        ({"a": TEXT[:-4]}, None, "'a' must be 32 bytes"),
        ({"a": 5}, None, "a int that is not their base64"),
        ({"": RAW}, None, "'' is no id of a key"),
        ({"a:b": RAW}, None, "no id of a key"),
        ({"x" * 65: RAW}, None, "1 to 64 characters"),
        ({5: RAW}, None, "5 is no id of a key"),
        ({TEXT: RAW}, None, "is itself a key"),
    ],
)
def test_what_is_refused(keys: Any, current: Any, text: str) -> None:
    """Each mistake is named with what is allowed, and no key is in the text."""
    with pytest.raises(InvalidSettings) as caught:
        Keyring(keys, current=current)
    assert text in str(caught.value)
    for secret in (TEXT, TEXT[:-4], "secret?", repr(RAW)):
        assert secret not in str(caught.value)


def test_from_the_environment() -> None:
    """The first key encrypts, blanks around the commas do not matter."""
    ring = Keyring.from_env({"S3QUEUE_ENCRYPTION_KEYS": f"new:{TEXT}, old:{OTHER},"}, accept_plaintext=False)
    assert (ring.current, ring.ids, ring.get("old"), ring.accept_plaintext) == ("new", ["new", "old"], bytes(32), False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is not set, or has no key"),
        (" , ", "is not set, or has no key"),
        (TEXT, "has no id before key number 1"),
        (f"a:{OTHER},{TEXT}", "has no id before key number 2"),
        (f"a:{TEXT},a:{OTHER}", "names the key 'a' twice"),
        (f"{TEXT}:a", "is itself a key"),
        ("a:b", "'a' must be 32 bytes"),
    ],
)
def test_wrong_environment(text: str | None, said: str) -> None:
    """The text is explained, and never repeated."""
    with pytest.raises(InvalidSettings) as caught:
        Keyring.from_env({} if text is None else {"S3QUEUE_ENCRYPTION_KEYS": text})
    assert said in str(caught.value)
    assert TEXT not in str(caught.value)


def test_a_queue_takes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable alone makes a queue encrypt; a wrong one, an empty one too, is an error and never plaintext."""
    monkeypatch.setenv("S3QUEUE_ENCRYPTION_KEYS", f"k:{TEXT}")
    ring = S3Queue("memory://")._shared.packer._keyring
    assert ring is not None
    assert ring.current == "k"
    for wrong in ("", "k:x"):
        monkeypatch.setenv("S3QUEUE_ENCRYPTION_KEYS", wrong)
        with pytest.raises(InvalidSettings, match=r"32 bytes|has no key"):
            S3Queue("memory://")


def test_something_else_as_keyring() -> None:
    """What is no keyring is refused when the queue is made, without showing it."""
    wrong: Any = {"a": TEXT}
    with pytest.raises(InvalidSettings, match="must be a Keyring, not a dict") as caught:
        S3Queue("memory://", keyring=wrong)
    assert TEXT not in str(caught.value)


def test_no_text_shows_a_key() -> None:
    """repr and str name the ids only."""
    ring = Keyring({"a": RAW})
    assert repr(ring) == str(ring) == "<Keyring a; current a>"


def without(monkeypatch: pytest.MonkeyPatch, package: str, module: str) -> None:
    """Until the test ends it is as if the package were not installed, and our module that needs it not imported yet."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"s3queue_async.{module}", raising=False)


@pytest.mark.parametrize(
    ("package", "module", "make", "extra"),
    [
        ("cryptography", "encryption", lambda: Keyring({"a": RAW}), "s3queue-async[encryption]"),
        ("zstandard", "compression", lambda: S3Queue("memory://", settings=Settings(compression="zstd")),
         "s3queue-async[zstd]"),
    ],
)  # fmt: skip
def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, package: str, module: str, make: Any, extra: str) -> None:
    """Without the package, asking for what needs it says at once what to install; a queue without it works."""
    without(monkeypatch, package, module)
    with pytest.raises(InvalidSettings) as caught:
        make()
    assert extra in str(caught.value)
    S3Queue("memory://")


@pytest.mark.parametrize("value", ["gzip", True, 3, ""])
def test_other_compressions(value: Any) -> None:
    """Only the names that are there, and None."""
    with pytest.raises(InvalidSettings, match=r"compression=.* must be one of: None, 'zstd'"):
        Settings(compression=value)


def test_compression_from_the_environment() -> None:
    """By its name, or none."""
    assert Settings().with_environment({"S3QUEUE_COMPRESSION": "ZSTD"}).compression == "zstd"
    assert Settings().with_environment({"S3QUEUE_COMPRESSION": "none"}).compression is None
    with pytest.raises(InvalidSettings, match=r"S3QUEUE_COMPRESSION='lz4' must be one of: None, 'zstd'"):
        Settings().with_environment({"S3QUEUE_COMPRESSION": "lz4"})
