"""The keys that a queue's messages are encrypted with."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Mapping
from typing import Self

from s3queue_async.errors import InvalidSettings

KEYS_VARIABLE = "S3QUEUE_ENCRYPTION_KEYS"
KEY_BYTES = 32
KEY_ID_LENGTH_MAX = 64
EXTRA_HINT = "pip install 's3queue-async[encryption]'"


class Keyring:
    """Keys by their ids: one encrypts what is written, each decrypts what was written with it.

    Give it to every producer and every worker of a queue. To change the key: add the new one everywhere, then make it
    ``current`` everywhere, and take the old one away once nothing that it encrypted is left (docs/security.md).

    Args:
        keys: Key ids (1 to 64 characters, without ``:`` and ``,``) to keys: 32 random bytes, or their base64 text, as
            ``new_key`` makes it. The ids can be read in the store.
        current: The id of the key that encrypts; None: the only one.
        accept_plaintext: Whether to read what is not encrypted, such as messages from before there was a keyring.

    Raises:
        InvalidSettings: A key or an id is none, ``current`` is not among them, or the extra ``encryption`` is missing.
    """

    def __init__(
        self, keys: Mapping[str, bytes | str], *, current: str | None = None, accept_plaintext: bool = True
    ) -> None:
        self._keys = {_checked_id(key_id): _checked_key(key_id, key) for key_id, key in keys.items()}
        if current is None:
            if len(self._keys) != 1:
                raise InvalidSettings(
                    f"The keyring has {len(self._keys)} keys, and current is not given.",
                    suggestion="Say which key encrypts: Keyring(keys, current=...).",
                )
            (current,) = self._keys
        if current not in self._keys:
            raise InvalidSettings(
                f"current={current!r} is not in the keyring, which has: {', '.join(map(repr, self._keys))}.",
                suggestion="Use the id of one of its keys.",
            )
        self.current = current
        self.accept_plaintext = accept_plaintext
        _require_extra()

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None, *, accept_plaintext: bool = True) -> Self:
        """The keyring that S3QUEUE_ENCRYPTION_KEYS describes: ``id:key,id:key``; the first one encrypts.

        Args:
            environment: Instead of the process's.
            accept_plaintext: As above.

        Raises:
            InvalidSettings: The variable is missing, or its text is no list of keys.
        """
        text = (os.environ if environment is None else environment).get(KEYS_VARIABLE, "")
        keys: dict[str, bytes | str] = {}
        for number, item in enumerate(part.strip() for part in text.split(",") if part.strip()):
            key_id, colon, key = item.partition(":")
            if not colon or key_id in keys:
                # Never the text itself: it may be a key.
                what = f"names the key {key_id!r} twice" if colon else f"has no id before key number {number + 1}"
                raise InvalidSettings(f"{KEYS_VARIABLE} {what}.", suggestion="Write id:key,id:key.")
            keys[key_id] = key
        if not keys:
            raise InvalidSettings(
                f"{KEYS_VARIABLE} is not set, or has no key.", suggestion="Set it to id:key,id:key; the first encrypts."
            )
        return cls(keys, current=next(iter(keys)), accept_plaintext=accept_plaintext)

    @staticmethod
    def new_key() -> str:
        """A new random key as base64 text. Keep it where secrets are kept: without it the messages are lost."""
        return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()

    def get(self, key_id: str) -> bytes | None:
        """The key of that id, if it is there."""
        return self._keys.get(key_id)

    @property
    def ids(self) -> list[str]:
        """The ids of all keys."""
        return list(self._keys)

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(self._keys)}; current {self.current}>"


def keyring_from_environment() -> Keyring | None:
    """What S3QUEUE_ENCRYPTION_KEYS says; None when it is not set."""
    return Keyring.from_env() if os.environ.get(KEYS_VARIABLE) is not None else None


def _checked_id(key_id: object) -> str:
    if not isinstance(key_id, str) or not 0 < len(key_id) <= KEY_ID_LENGTH_MAX or set(key_id) & set(":,"):
        raise InvalidSettings(
            f"{key_id!r} is no id of a key: it must be text of 1 to {KEY_ID_LENGTH_MAX} characters without ':' and ','."
        )
    if _decoded(key_id) is not None:
        raise InvalidSettings("A key's id is itself a key: ids can be read in the store.", suggestion="Write id:key.")
    return key_id


def _decoded(text: str) -> bytes | None:
    """What base64 text says, if it is a key."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return raw if len(raw) == KEY_BYTES else None


def _checked_key(key_id: str, key: object) -> bytes:
    raw = _decoded(key) if isinstance(key, str) else key
    if not isinstance(raw, bytes) or len(raw) != KEY_BYTES:
        # Never the key itself.
        what = f"{len(key)} bytes" if isinstance(key, bytes) else f"a {type(key).__name__} that is not their base64"
        raise InvalidSettings(
            f"The key {key_id!r} must be {KEY_BYTES} bytes, or their base64 text; it is {what}.",
            suggestion="Make one with Keyring.new_key().",
        )
    return raw


def _require_extra() -> None:
    try:
        import s3queue_async.encryption  # noqa: F401
    except ImportError as error:
        raise InvalidSettings(
            f"A Keyring needs the extra 'encryption' ({error}).", suggestion=f"{EXTRA_HINT}."
        ) from error
