"""AES-256-GCM under keys that are derived for one object each; needs the extra ``encryption``.

Every object has a random salt, from which HKDF makes a key of its own. So no key encrypts more than the few parts of
one object, and their nonces can be counted: there is no number of objects after which a nonce might repeat.
Sources: NIST SP 800-38D, section 8.3 (at most 2^32 random nonces a key); RFC 5869 (HKDF); RFC 8188 (a key a message by
HKDF with a random salt); the AWS Encryption SDK's algorithm suites (a commitment to the key by the same HKDF).
"""

from __future__ import annotations

import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
SALT_BYTES = 32
COMMITMENT_BYTES = 32
TAG_BYTES = 16
NONCE_BYTES = 12
INFO = b"s3queue_async AES-256-GCM 1"


class WrongKey(Exception):
    """This is not the key that the object was encrypted with."""


class Tampered(Exception):
    """The key is right, and the bytes or what they are bound to are not those that were encrypted."""


class ObjectKey:
    """The key of one object.

    Args:
        key: The key that the objects' keys are derived from, 32 bytes.
        salt: The object's; None for a new one.
        commitment: What the object says of its key; None for a new one.

    Attributes:
        salt: 32 random bytes.
        commitment: Tells this key from every other; it says nothing about it.

    Raises:
        WrongKey: The commitment is to another key.
    """

    def __init__(self, key: bytes, salt: bytes | None = None, commitment: bytes | None = None) -> None:
        # Never from the queue's injected chance: a seed that repeats would repeat keys and nonces.
        self.salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
        derived = HKDF(SHA256(), KEY_BYTES + COMMITMENT_BYTES, self.salt, INFO).derive(key)
        self.commitment = derived[KEY_BYTES:]
        if commitment is not None and not hmac.compare_digest(commitment, self.commitment):
            raise WrongKey
        self._cipher = AESGCM(derived[:KEY_BYTES])

    def encrypt(self, part: int, data: bytes, bound_to: bytes) -> bytes:
        """The ciphertext with its tag.

        Args:
            part: Which part of the object, from 0; each once.
            data: What is encrypted.
            bound_to: What must be the same when it is decrypted.
        """
        return self._cipher.encrypt(part.to_bytes(NONCE_BYTES, "big"), data, bound_to)

    def decrypt(self, part: int, data: bytes, bound_to: bytes) -> bytes:
        """What ``encrypt`` was given. Raises Tampered when it was not these bytes, or bound to something else."""
        try:
            return self._cipher.decrypt(part.to_bytes(NONCE_BYTES, "big"), data, bound_to)
        except InvalidTag as error:
            raise Tampered from error
