"""Routes that make and end identities: join tokens, API tokens, client certificates, revocation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from pgherd.collector.api.auth import Actor, require
from pgherd.collector.identity.apitokens import Scope, create_api_token, list_api_tokens, revoke_api_token
from pgherd.collector.identity.enrolment import Enrolment
from pgherd.collector.identity.gate import PeerGate
from pgherd.collector.identity.registry import list_clients, revoke_agent
from pgherd.collector.identity.tokens import create_join_token, list_join_tokens, withdraw_join_token
from pgherd.proto.errors import TransientError

T = TypeVar("T")

_STORE_TIMEOUT_S = 20.0
_DAY_S = 86400.0

Admin = Annotated[Actor, Depends(require(Scope.ADMIN))]


class JoinTokenRequest(BaseModel):
    """POST /api/v1/join-tokens."""

    model_config = ConfigDict(extra="forbid")
    name: str | None = Field(None, min_length=1, max_length=255)
    labels: dict[str, str] = Field(default_factory=dict)
    lifetime_s: float | None = Field(None, gt=0, le=7 * _DAY_S)


class ApiTokenRequest(BaseModel):
    """POST /api/v1/tokens."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=255)
    scope: Scope
    lifetime_s: float = Field(90 * _DAY_S, gt=0)


class ClientRequest(BaseModel):
    """POST /api/v1/clients; the CLI keeps the private key and sends the request only."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=255)
    csr: str = Field(max_length=16 * 1024)
    lifetime_s: float = Field(30 * _DAY_S, gt=0)


class RevokeRequest(BaseModel):
    """POST /api/v1/agents/{id}/revoke."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field("", max_length=200)


def identity_router(
    enrolment: Enrolment, gate: PeerGate, *, enrol_host: str, enrol_port: int, token_lifetime_s: float
) -> APIRouter:
    """The router; mount it at the application's root. `enrol_host:enrol_port` is what agents can reach :7434 by."""
    router = APIRouter(prefix="/api/v1", tags=["identity"])
    store, clock = enrolment.store, enrolment.clock

    @router.post("/join-tokens", status_code=201)
    async def add_join_token(body: JoinTokenRequest, actor: Admin) -> dict[str, Any]:
        """Make a single-use join token; this answer is the only place where its secret ever shows."""
        lifetime_s = body.lifetime_s or token_lifetime_s

        def work() -> dict[str, Any]:
            now_unix_ns = clock.wall_unix_ns()
            with store.begin() as connection:
                token = create_join_token(
                    connection,
                    now_unix_ns=now_unix_ns,
                    lifetime_s=lifetime_s,
                    actor=actor.name,
                    via=actor.via,
                    ca_pin=enrolment.ca.pin,
                    host=enrol_host,
                    port=enrol_port,
                    name=body.name,
                    labels=body.labels,
                )
            return {"id": token.id, "token": str(token), "expires_unix_ns": now_unix_ns + int(lifetime_s * 1e9)}

        return await _in_thread(work)

    @router.get("/join-tokens")
    async def join_tokens(actor: Admin) -> dict[str, Any]:
        """Join tokens, newest first, without their secrets."""

        def work() -> dict[str, Any]:
            with store.read() as connection:
                return {"items": list_join_tokens(connection), "next_cursor": None}

        return await _in_thread(work)

    @router.delete("/join-tokens/{token_id}", status_code=204)
    async def remove_join_token(token_id: str, actor: Admin) -> None:
        """Withdraw an unused join token."""

        def work() -> None:
            with store.begin() as connection:
                withdraw_join_token(connection, token_id, now_unix_ns=clock.wall_unix_ns(), actor=actor.name, via=actor.via)

        await _in_thread(work)

    @router.post("/tokens", status_code=201)
    async def add_token(body: ApiTokenRequest, actor: Admin) -> dict[str, Any]:
        """Make a bearer token; this answer is the only place where it ever shows."""

        def work() -> dict[str, Any]:
            now_unix_ns = clock.wall_unix_ns()
            with store.begin() as connection:
                token_id, text = create_api_token(
                    connection,
                    name=body.name,
                    scope=body.scope,
                    lifetime_s=body.lifetime_s,
                    now_unix_ns=now_unix_ns,
                    actor=actor.name,
                    via=actor.via,
                )
            return {"id": token_id, "token": text, "expires_unix_ns": now_unix_ns + int(body.lifetime_s * 1e9)}

        return await _in_thread(work)

    @router.get("/tokens")
    async def tokens(actor: Admin) -> dict[str, Any]:
        """Bearer tokens, newest first, without their secrets."""

        def work() -> dict[str, Any]:
            with store.read() as connection:
                return {"items": list_api_tokens(connection), "next_cursor": None}

        return await _in_thread(work)

    @router.delete("/tokens/{token_id}", status_code=204)
    async def remove_token(token_id: str, actor: Admin) -> None:
        """Revoke a bearer token at once."""

        def work() -> None:
            with store.begin() as connection:
                revoke_api_token(connection, token_id, now_unix_ns=clock.wall_unix_ns(), actor=actor.name, via=actor.via)

        await _in_thread(work)

    @router.post("/agents/{agent_id}/revoke")
    async def revoke(agent_id: str, actor: Admin, body: RevokeRequest | None = None) -> dict[str, Any]:
        """End an agent's or client's identity for good and cut its open calls."""

        def work() -> int:
            return revoke_agent(
                store,
                agent_id,
                now_unix_ns=clock.wall_unix_ns(),
                actor=actor.name,
                via=actor.via,
                reason=body.reason if body else "",
            )

        certificates = await _in_thread(work)
        return {"agent_id": agent_id, "certificates_revoked": certificates, "calls_cut": gate.cut([agent_id])}

    @router.get("/clients")
    async def clients(actor: Admin) -> dict[str, Any]:
        """Foreign OTLP clients, newest first; `POST /agents/{id}/revoke` ends one."""

        def work() -> dict[str, Any]:
            with store.read() as connection:
                return {"items": list_clients(connection), "next_cursor": None}

        return await _in_thread(work)

    @router.post("/clients", status_code=201)
    async def add_client(body: ClientRequest, actor: Admin) -> dict[str, Any]:
        """Sign a certificate for a foreign OTLP client."""

        def work() -> dict[str, Any]:
            joined = enrolment.issue_client(body.name, body.csr, body.lifetime_s, actor=actor.name, via=actor.via)
            return {
                "client_id": joined.agent_id,
                "certificate": joined.issued.pem,
                "ca": enrolment.ca.certificate_pem.decode("ascii"),
                "serial": joined.issued.serial,
                "not_after_unix_ns": joined.issued.not_after_unix_ns,
            }

        return await _in_thread(work)

    return router


async def _in_thread(work: Callable[[], T]) -> T:
    try:
        async with asyncio.timeout(_STORE_TIMEOUT_S):
            return await asyncio.to_thread(work)
    except TimeoutError as error:
        raise TransientError("store.unavailable", "the control store doesn't answer") from error
