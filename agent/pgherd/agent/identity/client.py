"""HTTPS to the enrolment port: answers and waits bounded, and each way it can fail named."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping

from pgherd.proto.codes import REGISTRY
from pgherd.proto.enrolment import CA_PATH
from pgherd.proto.errors import DeniedError, PeerError, PgherdError, TransientError, from_dict
from pgherd.runtime.tls import pinned_context, spki_sha256, unverified_context

_TIMEOUT_S = 15.0
_ANSWER_BYTES_MAX = 64 * 1024
_VERIFY_HOSTNAME_MISMATCH = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def fetch_pinned_ca(host: str, port: int, ca_pin: str) -> str:
    """The collector's CA certificate (PEM), if its public key is the pinned one.

    This one request is made to whoever answers; nothing of ours is in it and nothing of it is believed
    but what the pin proves. Raises DeniedError peer.untrusted, TransientError peer.unreachable, PeerError.
    """
    answer = call(host, port, "GET", CA_PATH, None, unverified_context())
    ca_pem = text_member(answer, "ca")
    if spki_sha256(ca_pem) != ca_pin:
        raise DeniedError(
            "peer.untrusted",
            f"whoever answers at {host}:{port} isn't the collector that made this token",
            hint="check the address and what stands between; if the collector was set up anew, make a new token",
            host=host,
            port=port,
        )
    return ca_pem


def post(host: str, port: int, path: str, body: Mapping[str, object], ca_pem: str) -> Mapping[str, object]:
    """POST to the collector that `ca_pem` vouches for. Raises what the collector answered, or as `call`."""
    return call(host, port, "POST", path, body, pinned_context(ca_pem))


def call(
    host: str, port: int, method: str, path: str, body: Mapping[str, object] | None, context: ssl.SSLContext
) -> Mapping[str, object]:
    """One request, one JSON object back.

    Raises DeniedError peer.untrusted (certificate or host name), TransientError peer.unreachable,
    PeerError peer.protocol, or the error that the collector's problem document carries.
    """
    connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)
    try:
        connection.request(
            method, path, body=json.dumps(body) if body is not None else None, headers={"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        content = response.read(_ANSWER_BYTES_MAX + 1)
    except ssl.SSLCertVerificationError as error:
        raise _untrusted(host, port, error) from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(
            "peer.unreachable",
            f"can't reach the collector's enrolment port at {host}:{port}: {error}",
            hint="check that the collector runs and that this host may open that port",
            host=host,
            port=port,
        ) from error
    finally:
        connection.close()
    document = _object(content, host, port)
    if response.status >= 300:
        raise _answered_error(document, response.status)
    return document


def text_member(document: Mapping[str, object], name: str) -> str:
    """A text of the answer. Raises PeerError peer.protocol."""
    value = document.get(name)
    if not isinstance(value, str) or not value:
        raise PeerError("peer.protocol", f"the collector's answer lacks {name}")
    return value


def int_member(document: Mapping[str, object], name: str) -> int:
    """A whole number of the answer. Raises PeerError peer.protocol."""
    value = document.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise PeerError("peer.protocol", f"the collector's answer lacks {name}")
    return value


def _object(content: bytes, host: str, port: int) -> Mapping[str, object]:
    try:
        document = json.loads(content) if len(content) <= _ANSWER_BYTES_MAX else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise PeerError(
            "peer.protocol", f"{host}:{port} doesn't answer like a pgherd collector", hint="is that the enrolment port (7434)?"
        )
    return document


def _answered_error(document: Mapping[str, object], status: int) -> PgherdError:
    if document.get("code") in REGISTRY:
        return from_dict(document)
    return PeerError("peer.protocol", f"the collector answered with HTTP status {status}", status=status)


def _untrusted(host: str, port: int, error: ssl.SSLCertVerificationError) -> DeniedError:
    if error.verify_code in _VERIFY_HOSTNAME_MISMATCH:
        return DeniedError(
            "peer.name_mismatch",
            f"the collector's certificate isn't for {host}",
            hint=f"add {host!r} to enrol.names of the collector, or make the token for a name that is there",
            host=host,
            port=port,
        )
    return DeniedError(
        "peer.untrusted",
        f"the certificate of {host}:{port} isn't signed by the pinned CA: {error.verify_message}",
        hint="check the clock of this host and what stands between it and the collector",
        host=host,
        port=port,
    )
