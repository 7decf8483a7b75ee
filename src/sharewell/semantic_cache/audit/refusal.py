"""Whom the audit may attack: a copy of what is the caller's own, and nothing else.

A cache object in this process, a file that the caller owns, or a server on a loopback address that proves to
know the audit token which its owner set. The copy is made by SQLite's backup from a connection that cannot
write, so the audited file keeps every byte.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
import sqlite3
import stat
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

AUDIT_PATH = "/sharewell/cache/audit"
NONCE_HEADER, PROOF_FIELD, FILE_FIELD = "x-sharewell-audit-nonce", "proof", "file"
MIN_TOKEN_CHARS = 16
_MAX_GRANT_BYTES = 65_536
_TIMEOUT_S = 10.0


class AuditRefused(PermissionError):
    """The target is not one that may be audited; the message says why."""


def copy_cache(path: Path, folder: Path) -> Path:
    """A copy of the cache file ``path`` in ``folder``; the original keeps every byte.

    Raises AuditRefused for a file that is missing, not a regular file, not the caller's own, or no cache.
    """
    check_own(path)
    wal = path.with_name(path.name + "-wal")
    # Without a write-ahead log nobody has the file open, and `immutable` leaves no side files behind.
    mode = "mode=ro" if wal.exists() else "mode=ro&immutable=1"
    target = folder / "audited-copy.sqlite"
    try:
        with (
            closing(
                sqlite3.connect(f"file:{urllib.parse.quote(str(path.resolve()))}?{mode}", uri=True)
            ) as own,
            closing(sqlite3.connect(target)) as copy,
        ):
            own.backup(copy)
    except sqlite3.Error as error:
        raise AuditRefused(f"{path.name} cannot be copied: {error}") from None
    return target


def check_own(path: Path) -> None:
    """Raises AuditRefused for a file that is missing, not a regular file or not the caller's own."""
    try:
        status = path.stat()
    except OSError as error:
        raise AuditRefused(f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise AuditRefused(f"{path.name} is not a regular file")
    if status.st_uid != os.geteuid():
        raise AuditRefused(f"{path.name} belongs to another user: only its owner may audit it")


def grant(token: str, nonce: str, file: Path | None) -> dict[str, Any]:
    """What a server answers at :data:`AUDIT_PATH` when its owner set ``token``: a proof that it knows the
    token, bound to the caller's ``nonce``, and where its cache lies.

    Raises AuditRefused for a token below 16 characters or a missing nonce.
    """
    _check_token(token)
    if not 16 <= len(nonce) <= 200:
        raise AuditRefused("the nonce must have 16 to 200 characters")
    return {PROOF_FIELD: _proof(token, nonce), FILE_FIELD: None if file is None else str(file.resolve())}


def loopback_cache_file(url: str, token: str) -> Path:
    """The cache file of a server on this machine whose owner allowed the audit.

    Raises AuditRefused for another scheme than http, a host that is not a loopback address, or a server that
    does not prove to know ``token``.
    """
    _check_token(token)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise AuditRefused(f"the address must be http://<loopback>:<port>, got {url!r:.200}")
    if parts.username or parts.password:
        raise AuditRefused("the address must not hold a user or password")
    try:
        port = parts.port or 80
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise AuditRefused(f"{parts.hostname} cannot be resolved: {error}") from None
    addresses = {str(entry[4][0]) for entry in found}
    if not addresses or not all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses):
        raise AuditRefused(
            f"{parts.hostname} is not a loopback address: only your own machine may be audited"
        )
    nonce = secrets.token_hex(16)
    address = min(addresses)  # the one that was checked, so that a second look-up cannot lead elsewhere
    host = f"[{address}]" if ":" in address else address
    request = urllib.request.Request(f"http://{host}:{port}{AUDIT_PATH}", headers={NONCE_HEADER: nonce})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            document = json.loads(answer.read(_MAX_GRANT_BYTES))
    except (OSError, ValueError) as error:
        raise AuditRefused(f"{parts.hostname}:{port} does not allow an audit: {error}") from None
    proof = document.get(PROOF_FIELD) if isinstance(document, dict) else None
    if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), _proof(token, nonce).encode()):
        raise AuditRefused(f"{parts.hostname}:{port} does not know this audit token")
    file = document.get(FILE_FIELD)
    if not isinstance(file, str):
        raise AuditRefused(f"{parts.hostname}:{port} keeps its cache in memory: audit the object instead")
    return Path(file)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _check_token(token: str) -> None:
    if len(token) < MIN_TOKEN_CHARS:
        raise AuditRefused(f"the audit token must have at least {MIN_TOKEN_CHARS} characters")


def _proof(token: str, nonce: str) -> str:
    return hmac.new(token.encode(), f"sharewell audit {nonce}".encode(), hashlib.sha256).hexdigest()
