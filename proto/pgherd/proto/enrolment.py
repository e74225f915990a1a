"""What agent and collector agree on when an agent joins and renews: the token's text and the bodies over HTTPS.

A join token is one line that a person copies: who to ask (host:port), how to know them (the SHA-256 of the
CA's public key) and the right to join once (id and secret).

    pgherd1_<id>_<secret>_<spki sha256>@<host>:<port>

Id and secret are lower-case base32 (base64url would contain the separator). Pure.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from pgherd.proto.errors import ConfigError

TOKEN_SECRET_BYTES = 32
TOKEN_ID_BYTES = 6
CA_PATH = "/v1/ca"
JOIN_PATH = "/v1/join"
RENEW_PATH = "/v1/renew"
BODY_BYTES_MAX = 16 * 1024

_TOKEN_RE = re.compile(r"pgherd1_([a-z2-7]{10})_([a-z2-7]{52})_([0-9a-f]{64})@(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_RENEWAL_CONTEXT = b"pgherd-renew-v1\x00"


def base32_text(raw: bytes) -> str:
    """Lower-case base32 without padding."""
    return base64.b32encode(raw).decode("ascii").rstrip("=").lower()


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A parsed join token. Its repr doesn't show the secret; `str()` is the line to copy."""

    id: str
    secret: str
    ca_pin: str  # SHA-256 of the CA's SubjectPublicKeyInfo, hexadecimal
    host: str  # without the brackets of an IPv6 address
    port: int

    def __str__(self) -> str:
        return f"pgherd1_{self.id}_{self.secret}_{self.ca_pin}@{join_address(self.host, self.port)}"

    def __repr__(self) -> str:
        return f"JoinToken(id={self.id!r}, host={self.host!r}, port={self.port})"

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises ConfigError join.token_malformed, never quoting the text."""
        match = _TOKEN_RE.fullmatch(text.strip())
        if match is None or not 0 < int(match[5]) < 65536:
            raise ConfigError(
                "join.token_malformed",
                "this isn't a join token",
                hint="copy the whole line that `pgherd agents add` printed; it starts with pgherd1_",
            )
        return cls(id=match[1], secret=match[2], ca_pin=match[3], host=match[4].strip("[]"), port=int(match[5]))


def renewal_bytes(*, certificate_sha256: bytes, request_sha256: bytes, unix_ns: int) -> bytes:
    """What the OLD key signs: the old certificate's and the new request's SHA-256 (of DER) and the agent's time.

    A replay is worthless: the collector accepts each new public key once per agent.
    """
    return _RENEWAL_CONTEXT + certificate_sha256 + request_sha256 + unix_ns.to_bytes(8, "big", signed=True)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ConfigError usage.invalid."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ConfigError("usage.invalid", f"{address[:255]!r} isn't host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
