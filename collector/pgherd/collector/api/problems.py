"""Errors on their way out over HTTP: problem+json (RFC 9457), one shape for every route of the collector."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from pgherd.proto.errors import PgherdError


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
    """Make `app` answer every PgherdError with `problem_response`."""

    def answer(_request: Request, error: Exception) -> Response:
        assert isinstance(error, PgherdError), "registered for this class only"
        return problem_response(error)

    app.add_exception_handler(PgherdError, answer)
