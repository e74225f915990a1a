"""Errors on their way out over HTTP: problem+json (RFC 9457), one shape for every route of the collector."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse, Response

from pgherd.proto.errors import ConfigError, PgherdError


def problem_response(error: PgherdError) -> Response:
    """The response for an error: status and code from the registry, hint, and what HTTP wants besides."""
    headers = {}
    if error.info.http_status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="pgherd"'
    retry_after_s = error.context.get("retry_after_s")
    if isinstance(retry_after_s, int):
        headers["Retry-After"] = str(retry_after_s)
    body = {"type": f"urn:pgherd:error:{error.code}", "title": error.message, "status": error.info.http_status}
    return JSONResponse(
        body | error.as_dict(), status_code=error.info.http_status, headers=headers, media_type="application/problem+json"
    )


def install_problem_handler(app: FastAPI) -> None:
    """Make `app` answer every PgherdError, and every request that doesn't fit its route, with `problem_response`."""

    def answer(_request: Request, error: Exception) -> Response:
        assert isinstance(error, PgherdError), "registered for this class only"
        return problem_response(error)

    app.add_exception_handler(PgherdError, answer)
    app.add_exception_handler(RequestValidationError, _answer_unusable)


def _answer_unusable(_request: Request, error: Exception) -> Response:
    """A parameter or body that isn't what the route takes: usage.invalid, naming the first one."""
    assert isinstance(error, RequestValidationError), "registered for this class only"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return problem_response(ConfigError("usage.invalid", f"{where}: {first['msg']}", errors=len(error.errors())))
