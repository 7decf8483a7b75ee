"""The server's configuration."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ..core.config import EngineConfig


@dataclass(frozen=True)
class ServerConfig:
    """What ``sharewell serve`` serves and on which terms. Raises ValueError naming the field and its range.

    ``share_scope``: who shares computed prefixes and answers: "key" (requests of one API key; the default)
    or "all". ``relay``: "auto" lets requests that say nothing of it relay earlier answers of their key
    (approximately), "off" only those that ask. ``cache``: "exact" (equal requests are answered once),
    "semantic" (questions in other words as well) or "off"; a request may choose for itself unless it is off.
    ``cache_path``: its file, None for memory;
    ``cache_sampled``: also answer requests that ask for a fresh sample; ``cache_recheck``: share of
    the answers to other words that are computed as well, at the lowest priority, to compare;
    ``cache_queue``: requests in the engine from which on the cache is told of load (None: as many as run at
    once), twice as many being full load; ``audit_token``: lets
    ``sharewell cache audit`` on this machine find that file. ``state_path``: SQLite file
    of API keys, usage and stored responses; None keeps them in memory. ``max_buffered_bytes`` bounds the
    bodies of all requests together, ``body_timeout_s`` the time that a request's head, and then its body, may
    take, ``write_timeout_s`` the time that a client may leave its answer unread.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    served_names: tuple[str, ...] = ()
    embedding_model: str = "minilm"
    state_path: Path | None = None
    share_scope: str = "key"
    relay: str = "off"
    cache: str = "exact"
    cache_path: Path | None = None
    cache_sampled: bool = False
    cache_entries: int = 100_000
    cache_recheck: float = 0.01
    cache_queue: int | None = None
    audit_token: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_buffered_bytes: int = 256 << 20
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_connections: int = 1000
    keep_alive_s: float = 15.0
    drain_timeout_s: float = 30.0
    recover_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        if self.share_scope not in ("key", "all"):
            raise ValueError(f"share_scope must be 'key' or 'all', got {self.share_scope!r}")
        if self.relay not in ("off", "auto"):
            raise ValueError(f"relay must be 'off' or 'auto', got {self.relay!r}")
        if self.cache not in ("off", "exact", "semantic"):
            raise ValueError(f"cache must be 'off', 'exact' or 'semantic', got {self.cache!r}")
        if not 0 <= self.cache_recheck <= 1:
            raise ValueError(f"cache_recheck must be in [0, 1], got {self.cache_recheck}")
        if self.cache_queue is not None and self.cache_queue < 1:
            raise ValueError(f"cache_queue must be None or at least 1, got {self.cache_queue}")
        if self.audit_token is not None and len(self.audit_token) < 16:
            raise ValueError(f"audit_token must have at least 16 characters, got {len(self.audit_token)}")
        for name in (
            "cache_entries",
            "max_body_bytes",
            "max_buffered_bytes",
            "body_timeout_s",
            "write_timeout_s",
            "max_connections",
            "keep_alive_s",
            "drain_timeout_s",
            "recover_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in self.served_names:
            if not name or ":" in name:
                raise ValueError(f"served_names must be non-empty and without ':', got {name!r}")

    @property
    def loopback(self) -> bool:
        """True when only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which the model answers; the first is the one that answers carry."""
        base = Path(self.engine.model).name or self.engine.model
        return self.served_names or (base,)
