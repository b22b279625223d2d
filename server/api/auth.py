"""API keys: where they come from and how a request's key is checked."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from octavo.server.config import ServerConfig
from octavo.server.errors import RequestError, StartupError


def load_keys(config: ServerConfig) -> tuple[str, ...]:
    """All keys: of --api-key, OCTAVO_API_KEY and --api-key-file. None: the server is open.

    Raises StartupError if the file cannot be read or has no key: a server that was to be closed must not open.
    """
    keys = [*config.api_key, os.environ.get("OCTAVO_API_KEY", "")]
    if config.api_key_file is not None:
        try:
            lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"cannot read --api-key-file {config.api_key_file}: {error}") from None
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise StartupError(f"--api-key-file {config.api_key_file} holds no key")
        keys += from_file
    return tuple(dict.fromkeys(key for key in keys if key))


class Keys:
    """The keys as hashes."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def identify(self, authorization: bytes | None) -> str:
        """A name for the key that the header brings, "" on an open server. Raises RequestError (401)."""
        if not self._digests:
            return ""
        scheme, _, token = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # Every key is compared, so that the time says nothing about which one came near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(
                "A valid API key is needed, as 'Authorization: Bearer KEY'.", code="invalid_api_key", status=401
            )
        return digest.hex()[:16]
