"""Join tokens in the control store: made, listed, withdrawn, and consumed once.

Only the SHA-256 of a secret is kept (it has 256 random bits; a slow hash would add nothing).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from pgherd.collector.identity.audit import write_audit
from pgherd.proto.enrolment import TOKEN_ID_BYTES, TOKEN_SECRET_BYTES, JoinToken, base32_text
from pgherd.proto.errors import ConfigError, DeniedError, PreconditionError
from pgherd.storage.control.schema import join_tokens

LABELS_MAX = 32
_TEXT_MAX = 255


@dataclass(frozen=True, slots=True)
class Grant:
    """What a consumed token gives to the agent that joined with it."""

    token_id: str
    name: str | None
    labels: Mapping[str, str]
    actor: str  # who made the token


def secret_sha256(secret: str) -> str:
    """How a secret is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_join_token(
    connection: Connection,
    *,
    now_unix_ns: int,
    lifetime_s: float,
    actor: str,
    via: str,
    ca_pin: str,
    host: str,
    port: int,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> JoinToken:
    """A new single-use token, valid as soon as the transaction commits. Only the returned object has the secret.

    Raises ConfigError usage.invalid for labels or a name beyond their bounds.
    """
    labels = dict(labels or {})
    texts = [*labels, *labels.values(), name or ""]
    if len(labels) > LABELS_MAX or any(len(text) > _TEXT_MAX for text in texts):
        raise ConfigError("usage.invalid", f"at most {LABELS_MAX} labels, each text up to {_TEXT_MAX} characters")
    token = JoinToken(
        id=base32_text(secrets.token_bytes(TOKEN_ID_BYTES)),
        secret=base32_text(secrets.token_bytes(TOKEN_SECRET_BYTES)),
        ca_pin=ca_pin,
        host=host,
        port=port,
    )
    expires_unix_ns = now_unix_ns + int(lifetime_s * 1e9)
    connection.execute(
        insert(join_tokens).values(
            id=token.id,
            secret_sha256=secret_sha256(token.secret),
            created_unix_ns=now_unix_ns,
            expires_unix_ns=expires_unix_ns,
            uses_left=1,
            labels=labels,
            name=name,
            actor=actor,
        )
    )
    write_audit(
        connection,
        unix_ns=now_unix_ns,
        actor=actor,
        via=via,
        action="join_token.created",
        subject=token.id,
        name=name,
        expires_unix_ns=expires_unix_ns,
    )
    return token


def list_join_tokens(connection: Connection, *, limit: int = 1000) -> list[dict[str, object]]:
    """The newest tokens without anything secret."""
    columns = [column for column in join_tokens.c if column.name != "secret_sha256"]
    rows = connection.execute(select(*columns).order_by(join_tokens.c.created_unix_ns.desc()).limit(limit))
    return [dict(row) for row in rows.mappings()]


def withdraw_join_token(connection: Connection, token_id: str, *, now_unix_ns: int, actor: str, via: str) -> None:
    """Make a token useless. Raises PreconditionError token.not_found when no unused token has that id."""
    done = connection.execute(
        update(join_tokens)
        .where(join_tokens.c.id == token_id, join_tokens.c.uses_left > 0)
        .values(uses_left=0, expires_unix_ns=now_unix_ns)
    )
    if done.rowcount != 1:
        raise PreconditionError("token.not_found", "no unused join token has that id", token_id=token_id)
    write_audit(connection, unix_ns=now_unix_ns, actor=actor, via=via, action="join_token.withdrawn", subject=token_id)


def consume_join_token(connection: Connection, token_id: str, secret: str, *, now_unix_ns: int, agent_id: str) -> Grant:
    """Use a token up, in the caller's transaction: of many callers exactly one gets the grant.

    Raises DeniedError join.token_invalid | join.token_used | join.token_expired; the last two only tell
    who knows the secret.
    """
    row = connection.execute(select(join_tokens).where(join_tokens.c.id == token_id)).mappings().one_or_none()
    known = row["secret_sha256"] if row is not None else secret_sha256("")
    if not hmac.compare_digest(known, secret_sha256(secret)) or row is None:
        raise DeniedError("join.token_invalid", "the join token isn't known here", hint="make a new one: `pgherd agents add`")
    if row["used_unix_ns"] is not None:
        raise DeniedError(
            "join.token_used",
            "the join token has been used",
            hint="if that wasn't you, revoke that agent",
            agent=row["used_by_agent_id"],
        )
    if row["uses_left"] < 1:
        raise DeniedError("join.token_invalid", "the join token was withdrawn", hint="make a new one: `pgherd agents add`")
    if now_unix_ns >= row["expires_unix_ns"]:
        raise DeniedError("join.token_expired", "the join token has expired", hint="make a new one: `pgherd agents add`")
    taken = connection.execute(
        update(join_tokens)
        .where(join_tokens.c.id == token_id, join_tokens.c.uses_left > 0)
        .values(uses_left=join_tokens.c.uses_left - 1, used_unix_ns=now_unix_ns, used_by_agent_id=agent_id)
    )
    if taken.rowcount != 1:
        raise DeniedError("join.token_used", "the join token has been used")
    return Grant(token_id, row["name"], row["labels"], row["actor"])
