"""The HTTP client behind every verb of `pgherd`: one collector, by its local socket or by URL and token."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from pgherd.proto.codes import REGISTRY
from pgherd.proto.errors import ConfigError, DeniedError, PeerError, PgherdError, TransientError, from_dict
from pgherd.runtime.durable import read_secret

DEFAULT_SOCKET = Path("/var/lib/pgherd-collector/collector.sock")
DEFAULT_URL = "http://127.0.0.1:7432"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the collector is and how to be somebody there: `socket` or `url` with a token."""

    url: str
    socket: Path | None
    token: str | None

    @classmethod
    def resolve(cls, *, url: str | None, socket: Path | None, token_file: Path | None) -> Address:
        """From flags, then PGHERD_URL / PGHERD_SOCKET / PGHERD_TOKEN_FILE, then the default socket.

        Raises ConfigError config.secret_unreadable for an unusable token file.
        """
        environment = os.environ
        url = url or (None if socket else environment.get("PGHERD_URL"))
        if socket is None and url is None:
            named = environment.get("PGHERD_SOCKET")
            socket = Path(named) if named else (DEFAULT_SOCKET if DEFAULT_SOCKET.exists() else None)
        if token_file is None and "PGHERD_TOKEN_FILE" in environment:
            token_file = Path(environment["PGHERD_TOKEN_FILE"])
        token = read_secret(token_file) if token_file and socket is None else None
        return cls(url=url or DEFAULT_URL, socket=socket, token=token)

    def __str__(self) -> str:
        return str(self.socket) if self.socket else self.url


class Client:
    """Calls to one collector; answers are JSON, failures are PgherdErrors."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        self.address = address
        headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(address.socket)) if address.socket else None,
            base_url="http://collector" if address.socket else address.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, parameters: Mapping[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """GET and decode. Raises TransientError peer.unreachable and whatever the collector answered."""
        return self._call("GET", path, parameters=parameters, timeout_s=timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST JSON and decode; errors as `get`."""
        return self._call("POST", path, body=body or {})

    def delete(self, path: str) -> Any:
        """DELETE and decode; errors as `get`."""
        return self._call("DELETE", path)

    def pages(self, path: str, parameters: Mapping[str, Any] | None = None, *, items_max: int = 10_000) -> Iterator[Any]:
        """Items of a cursor-paged listing (`{"items": [...], "next_cursor": ...}`), at most `items_max`."""
        query = dict(parameters or {})
        count = 0
        while count < items_max:
            page = self.get(path, query)
            for item in page["items"]:
                count += 1
                yield item
            if not page.get("next_cursor"):
                return
            query["cursor"] = page["next_cursor"]

    def _call(
        self,
        method: str,
        path: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else httpx.Timeout(timeout_s, connect=5.0)
        query = {key: value for key, value in (parameters or {}).items() if value is not None}
        try:
            response = self._http.request(method, path, params=query, json=body, timeout=timeout)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise TransientError(
                "peer.unreachable",
                f"no collector answers at {self.address}: {error}",
                hint="is `pgherd collector run` up? state --socket or --url (PGHERD_SOCKET, PGHERD_URL)",
            ) from error
        if response.is_success:
            return response.json() if response.content else None
        raise _error_of(response)


def _prometheus_error(kind: str, message: str) -> PgherdError:
    if kind == "timeout":
        return TransientError("query.timeout", message)
    if kind == "unavailable":
        return TransientError("store.unavailable", message)
    return ConfigError("usage.invalid", message, error_type=kind)


def _error_of(response: httpx.Response) -> PgherdError:
    """The PgherdError in a problem+json answer, in a Prometheus-shaped error, or a plain one by status."""
    try:
        document = response.json()
    except ValueError:
        document = {}
    if isinstance(document, dict) and document.get("code") in REGISTRY:
        return from_dict({**document, "message": document.get("message") or document.get("detail", "")})
    if isinstance(document, dict) and document.get("status") == "error":  # Prometheus API
        return _prometheus_error(str(document.get("errorType")), str(document.get("error", "the query failed")))
    if response.status_code in (401, 403):
        return DeniedError(
            "auth.required", "the collector wants a token", hint="use --token-file, or the socket on its own host"
        )
    return PeerError("peer.protocol", f"the collector answered {response.status_code}", status=response.status_code)
