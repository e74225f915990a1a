"""Who may do what over HTTP: bearer tokens everywhere, on loopback too; the local user on the UNIX socket.

    app.state.authenticator = Authenticator(store, clock, ...)
    @router.get(...)
    async def route(actor: Annotated[Actor, Depends(require(Scope.VIEWER))]): ...

On the UNIX socket root, the collector's own user and the configured users are admins; everybody else is
refused, whatever they carry. A token that is presented must hold, even where reading is anonymous.
"""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from pgherd.collector.api.socketpeer import PEER_UID
from pgherd.collector.identity.apitokens import Scope, VerifiedToken, note_use, verify_api_token
from pgherd.proto.clock import Clock
from pgherd.proto.errors import DeniedError, TransientError
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.store import ControlStore

_log = get_logger(__name__)

_STORE_TIMEOUT_S = 10.0
_USE_NOTED_EVERY_NS = 60_000_000_000  # a write per request would be Grafana writing all day


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks. `name` goes into the ledger and the audit as it is."""

    name: str  # "uid:postgres", "token:grafana" or "anonymous"
    scope: Scope
    via: str  # "socket" or "http"


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Finds the actor of a request."""

    store: ControlStore
    clock: Clock
    socket_uids: frozenset[int] = field(default_factory=frozenset)  # besides root and our own
    anonymous_read: bool = False

    async def actor(self, request: Request) -> Actor:
        """Raises DeniedError auth.required | auth.invalid | auth.local_user, TransientError store.unavailable."""
        uid = request.scope.get("state", {}).get(PEER_UID)
        if uid is not None and uid not in {0, os.geteuid(), *self.socket_uids}:
            raise DeniedError(
                "auth.local_user",
                f"{user_name(uid)} may not use the collector's socket",
                hint="add the uid to http.socket_uids, or use a token over TCP",
            )
        authorization = request.headers.getlist("authorization")
        if authorization:
            token = await self._token(authorization, request.client.host if request.client else "socket")
            return Actor(f"token:{token.name}", token.scope, "http" if uid is None else "socket")
        if uid is not None:
            return Actor(f"uid:{user_name(uid)}", Scope.ADMIN, "socket")
        if self.anonymous_read:
            return Actor("anonymous", Scope.VIEWER, "http")
        raise DeniedError(
            "auth.required",
            "the request carries no bearer token",
            hint="make one on the collector's host: `pgherd tokens create`",
        )

    async def _token(self, authorization: list[str], source: str) -> VerifiedToken:
        scheme, _, text = authorization[0].partition(" ")
        if len(authorization) != 1 or scheme.lower() != "bearer":
            raise DeniedError("auth.invalid", "only one Authorization header of the form `Bearer pgherd_…` is understood")
        try:
            async with asyncio.timeout(_STORE_TIMEOUT_S):
                return await asyncio.to_thread(self._verify, text.strip(), source)
        except TimeoutError as error:
            raise TransientError("store.unavailable", "tokens can't be checked now") from error

    def _verify(self, text: str, source: str) -> VerifiedToken:
        now_unix_ns = self.clock.wall_unix_ns()
        with self.store.read() as connection:
            token = verify_api_token(connection, text, now_unix_ns)
        if token.last_used_unix_ns is None or now_unix_ns - token.last_used_unix_ns > _USE_NOTED_EVERY_NS:
            try:
                with self.store.begin() as connection:
                    note_use(connection, token.id, now_unix_ns=now_unix_ns, source=source)
            except TransientError as error:  # a full disk: the dashboards that show it must go on
                _log.warning("auth.use_not_noted", token=token.id, error=error.message)
        return token


def require(scope: Scope | str) -> Callable[[Request], Awaitable[Actor]]:
    """A FastAPI dependency: the actor, if its scope covers `scope`; else 401 or 403.

    The application carries the authenticator as `app.state.authenticator`.
    """
    wanted = Scope(scope)

    async def dependency(request: Request) -> Actor:
        authenticator: Authenticator = request.app.state.authenticator
        actor = await authenticator.actor(request)
        if actor.scope.covers(wanted):
            return actor
        if actor.name == "anonymous":
            raise DeniedError("auth.required", f"this needs a token of the scope {wanted.value}")
        raise DeniedError("auth.scope", f"{actor.name} is {actor.scope.value}; this needs {wanted.value}")

    return dependency


def user_name(uid: int) -> str:
    """The local name of a user, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
