"""Who writes in a gossip log: Ed25519 key pairs, signatures, and how a signature is stored."""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .wire import signed_part


class Identity:
    """An author: an Ed25519 key pair. The public key is the author's only name."""

    def __init__(self, seed: bytes | None = None) -> None:
        if seed is not None and len(seed) != 32:
            raise ValueError(f"seed must have 32 bytes, got {len(seed)}")
        self._key = (
            Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
        )
        self.author = self._key.public_key().public_bytes_raw()

    @property
    def secret(self) -> bytes:
        return self._key.private_bytes_raw()

    def sign(self, seq: int, link: bytes) -> bytes:
        return self._key.sign(signed_part(self.author, seq, link))


class Signatures:
    """Verifies signatures; keeps the keys that it has unpacked."""

    def __init__(self) -> None:
        self._keys: dict[bytes, Ed25519PublicKey] = {}

    def right(self, author: bytes, seq: int, link: bytes, signature: bytes) -> bool:
        """Whether ``author`` signed its rows up to number ``seq``, the last of which has this ``link``."""
        try:
            key = self._keys.get(author)
            if key is None:
                key = self._keys[author] = Ed25519PublicKey.from_public_bytes(author)
            key.verify(signature, signed_part(author, seq, link))
        except (InvalidSignature, ValueError):
            return False
        return True


def sealed(signature: bytes) -> bytes:
    """A signature as it is stored, with a checksum: verifying all of them at every opening takes long."""
    return signature + hashlib.blake2b(signature, digest_size=8).digest()
