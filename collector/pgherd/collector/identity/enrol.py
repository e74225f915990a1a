"""The HTTPS service on :7434, the only port that talks to strangers: the CA, joining, renewing.

Small on purpose: three routes, bodies of at most 16 KiB, a bucket of requests per address and one for
all, every wait bounded. Errors are problem+json with the registry's code, which the agent shows as it is.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pgherd.collector.api.problems import problem_response
from pgherd.collector.identity.enrolment import Enrolment, Joined
from pgherd.collector.identity.ratelimit import Buckets
from pgherd.proto.clock import Clock
from pgherd.proto.enrolment import BODY_BYTES_MAX, CA_PATH, JOIN_PATH, RENEW_PATH
from pgherd.proto.errors import ConfigError, PeerError, PgherdError, TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

_BODY_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 30.0
_RATE_PER_ADDRESS_S, _BURST_PER_ADDRESS = 20.0, 200.0  # a rack behind one NAT may renew together
_RATE_ALL_S, _BURST_ALL = 100.0, 500.0

Handler = Callable[[Request], Awaitable[Response]]


def enrolment_app(enrolment: Enrolment, *, grpc_address: str, clock: Clock) -> Starlette:
    """The ASGI application; serve it with TLS only. `grpc_address` (host:port) is told to agents that join or renew."""
    per_address = Buckets(_RATE_PER_ADDRESS_S, _BURST_PER_ADDRESS)
    for_all = Buckets(_RATE_ALL_S, _BURST_ALL)

    def guarded(handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                now_s = clock.mono_s()
                wait_s = per_address.wait_s(_source(request), now_s) or for_all.wait_s("", now_s)
                if wait_s > 0:
                    raise TransientError("enrol.busy", "too many requests", retry_after_s=math.ceil(wait_s))
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    return await handler(request)
            except TimeoutError:
                return problem_response(TransientError("store.unavailable", "the collector is too slow to answer now"))
            except PgherdError as error:
                _log.warning("enrol.refused", path=request.url.path, source=_source(request), code=error.code)
                return problem_response(error)

        return answer

    def granted(joined: Joined) -> Response:
        return JSONResponse(
            {
                "agent_id": joined.agent_id,
                "trust_domain": enrolment.ca.trust_domain,
                "certificate": joined.issued.pem,
                "serial": joined.issued.serial,
                "not_before_unix_ns": joined.issued.not_before_unix_ns,
                "not_after_unix_ns": joined.issued.not_after_unix_ns,
                "ca": enrolment.ca.certificate_pem.decode("ascii"),
                "grpc_address": grpc_address,
            }
        )

    async def ca(_request: Request) -> Response:
        return JSONResponse({"ca": enrolment.ca.certificate_pem.decode("ascii"), "trust_domain": enrolment.ca.trust_domain})

    async def join(request: Request) -> Response:
        body = await _body(request)
        facts = body.get("facts", {})
        if not isinstance(facts, Mapping):
            raise ConfigError("usage.invalid", "facts must be an object")
        joined = await asyncio.to_thread(
            enrolment.join, _text(body, "token_id"), _text(body, "token_secret"), _text(body, "csr"), facts, _source(request)
        )
        _log.info("enrol.joined", agent=joined.agent_id, source=_source(request))
        return granted(joined)

    async def renew(request: Request) -> Response:
        body = await _body(request)
        unix_ns = body.get("unix_ns")
        if not isinstance(unix_ns, int):
            raise ConfigError("usage.invalid", "unix_ns must be a number")
        joined = await asyncio.to_thread(
            enrolment.renew,
            _text(body, "certificate"),
            _text(body, "csr"),
            _text(body, "signature"),
            unix_ns,
            _source(request),
        )
        _log.info("enrol.renewed", agent=joined.agent_id, source=_source(request))
        return granted(joined)

    return Starlette(
        routes=[
            Route(CA_PATH, guarded(ca), methods=["GET"]),
            Route(JOIN_PATH, guarded(join), methods=["POST"]),
            Route(RENEW_PATH, guarded(renew), methods=["POST"]),
        ]
    )


def _source(request: Request) -> str:
    return request.client.host if request.client is not None else "unknown"


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises ConfigError usage.invalid, PeerError enrol.too_large for anything else, too long or too slow."""
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > BODY_BYTES_MAX:
                    raise PeerError("enrol.too_large", f"a body may have {BODY_BYTES_MAX} bytes", limit_bytes=BODY_BYTES_MAX)
        content.decode()  # UTF-8 is the only encoding of JSON here (RFC 8259), not the ones that json guesses
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text to hash or store
    except (TimeoutError, ClientDisconnect) as error:
        raise ConfigError("usage.invalid", "the body didn't arrive in time") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("usage.invalid", "the body isn't JSON") from error
    if not isinstance(body, dict):
        raise ConfigError("usage.invalid", "the body must be a JSON object")
    return body


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError("usage.invalid", f"{name} must be a text")
    return value
