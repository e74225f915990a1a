"""Bearer tokens of the HTTP API in the control store: `pgherd_<id>_<secret>`, hashed, scoped, expiring."""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection, insert, select, update

from pgherd.collector.identity.audit import write_audit
from pgherd.collector.identity.tokens import secret_sha256
from pgherd.proto.enrolment import TOKEN_ID_BYTES, TOKEN_SECRET_BYTES, base32_text
from pgherd.proto.errors import ConfigError, DeniedError, PreconditionError
from pgherd.storage.control.schema import api_tokens

_TOKEN_RE = re.compile(r"pgherd_([a-z2-7]{10})_([a-z2-7]{52})")
_LIFETIME_S_MAX = 5 * 366 * 86400.0


class Scope(StrEnum):
    """What a caller may do; each scope includes the ones before it."""

    VIEWER = "viewer"  # read
    OPERATOR = "operator"  # and command agents
    ADMIN = "admin"  # and make or end identities

    def covers(self, wanted: Scope) -> bool:
        order = list(Scope)
        return order.index(self) >= order.index(wanted)


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token that was presented and holds."""

    id: str
    name: str
    scope: Scope
    last_used_unix_ns: int | None


def create_api_token(
    connection: Connection, *, name: str, scope: Scope, lifetime_s: float, now_unix_ns: int, actor: str, via: str
) -> tuple[str, str]:
    """A new token as (id, text); the text is shown once and never again. Raises ConfigError usage.invalid."""
    if not 0 < len(name) <= 255 or not 0 < lifetime_s <= _LIFETIME_S_MAX:
        raise ConfigError("usage.invalid", "a token needs a name and a lifetime of at most five years")
    token_id, secret = base32_text(secrets.token_bytes(TOKEN_ID_BYTES)), base32_text(secrets.token_bytes(TOKEN_SECRET_BYTES))
    expires_unix_ns = now_unix_ns + int(lifetime_s * 1e9)
    connection.execute(
        insert(api_tokens).values(
            id=token_id,
            name=name,
            secret_sha256=secret_sha256(secret),
            scope=scope.value,
            actor=actor,
            created_unix_ns=now_unix_ns,
            expires_unix_ns=expires_unix_ns,
        )
    )
    write_audit(
        connection,
        unix_ns=now_unix_ns,
        actor=actor,
        via=via,
        action="api_token.created",
        subject=token_id,
        name=name,
        scope=scope.value,
        expires_unix_ns=expires_unix_ns,
    )
    return token_id, f"pgherd_{token_id}_{secret}"


def list_api_tokens(connection: Connection, *, limit: int = 1000) -> list[dict[str, object]]:
    """The newest tokens without anything secret."""
    columns = [column for column in api_tokens.c if column.name != "secret_sha256"]
    rows = connection.execute(select(*columns).order_by(api_tokens.c.created_unix_ns.desc()).limit(limit))
    return [dict(row) for row in rows.mappings()]


def revoke_api_token(connection: Connection, token_id: str, *, now_unix_ns: int, actor: str, via: str) -> None:
    """End a token at once; twice is no error. Raises PreconditionError token.not_found."""
    row = connection.execute(select(api_tokens.c.id).where(api_tokens.c.id == token_id)).one_or_none()
    if row is None:
        raise PreconditionError("token.not_found", f"no token has the id {token_id}")
    connection.execute(
        update(api_tokens)
        .where(api_tokens.c.id == token_id, api_tokens.c.revoked_unix_ns.is_(None))
        .values(revoked_unix_ns=now_unix_ns)
    )
    write_audit(connection, unix_ns=now_unix_ns, actor=actor, via=via, action="api_token.revoked", subject=token_id)


def verify_api_token(connection: Connection, text: str, now_unix_ns: int) -> VerifiedToken:
    """Who a presented token is. Raises DeniedError auth.invalid, the same for every reason."""
    match = _TOKEN_RE.fullmatch(text)
    row = None
    if match is not None:
        row = connection.execute(select(api_tokens).where(api_tokens.c.id == match[1])).mappings().one_or_none()
    known = row["secret_sha256"] if row is not None else secret_sha256("")
    presented = secret_sha256(match[2] if match is not None else "-")
    if (
        not hmac.compare_digest(known, presented)
        or row is None
        or row["revoked_unix_ns"] is not None
        or now_unix_ns >= row["expires_unix_ns"]
    ):
        raise DeniedError(
            "auth.invalid", "the bearer token isn't valid", hint="it may be expired or revoked: see `pgherd tokens ls`"
        )
    return VerifiedToken(row["id"], row["name"], Scope(row["scope"]), row["last_used_unix_ns"])


def note_use(connection: Connection, token_id: str, *, now_unix_ns: int, source: str) -> None:
    """Remember when and from where a token was last used."""
    connection.execute(
        update(api_tokens).where(api_tokens.c.id == token_id).values(last_used_unix_ns=now_unix_ns, last_used_from=source[:255])
    )
