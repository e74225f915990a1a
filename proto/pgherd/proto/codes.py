"""The one registry of error codes: what each means, who acts, and how it leaves the process.

A code is `area.fact`, stable for ever once released: users grep for it, alerts match on it and
`docs/errors.md` (made from this table, checked by a test) explains it. Add a row here before you
raise it; raising an unregistered code is a bug and fails at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Kind(StrEnum):
    """Who has to act when an error of this kind appears."""

    CONFIG = "config"  # the operator edits a file or a flag
    PRECONDITION = "precondition"  # the state of the world forbids it; change the state
    DENIED = "denied"  # an owner's policy or a missing right says no
    PEER = "peer"  # the other side broke the contract
    TRANSIENT = "transient"  # wait; the caller may retry
    INTEGRITY = "integrity"  # data is damaged or foreign: stop, nothing self-repairs
    INVARIANT = "invariant"  # our bug: stop and report


class Exit(IntEnum):
    """Exit status of both commands; stable, documented in docs/cli.md."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    DENIED = 4
    NEEDS_APPROVAL = 5
    PARTIAL = 6


@dataclass(frozen=True, slots=True)
class CodeInfo:
    """One row of the registry.

    `http_status` and `grpc_status` (a grpc.StatusCode name) are how the error leaves over the wire;
    `exit_status` how it leaves a command.
    """

    code: str
    kind: Kind
    meaning: str
    exit_status: Exit = Exit.FAILED
    http_status: int = 500
    grpc_status: str = "INTERNAL"


REGISTRY: dict[str, CodeInfo] = {}

_WIRE_DEFAULTS: dict[Kind, tuple[int, str]] = {
    Kind.CONFIG: (400, "INVALID_ARGUMENT"),
    Kind.PRECONDITION: (409, "FAILED_PRECONDITION"),
    Kind.DENIED: (403, "PERMISSION_DENIED"),
    Kind.PEER: (502, "INVALID_ARGUMENT"),
    Kind.TRANSIENT: (503, "UNAVAILABLE"),
    Kind.INTEGRITY: (500, "DATA_LOSS"),
    Kind.INVARIANT: (500, "INTERNAL"),
}
_EXIT_DEFAULTS: dict[Kind, Exit] = {Kind.CONFIG: Exit.USAGE, Kind.DENIED: Exit.DENIED}


def _code(
    code: str,
    kind: Kind,
    meaning: str,
    *,
    exit_status: Exit | None = None,
    http: int | None = None,
    grpc: str | None = None,
) -> None:
    if code in REGISTRY:
        raise ValueError(f"error code {code} is registered twice")
    wire_http, wire_grpc = _WIRE_DEFAULTS[kind]
    REGISTRY[code] = CodeInfo(
        code=code,
        kind=kind,
        meaning=meaning,
        exit_status=exit_status if exit_status is not None else _EXIT_DEFAULTS.get(kind, Exit.FAILED),
        http_status=http if http is not None else wire_http,
        grpc_status=grpc if grpc is not None else wire_grpc,
    )


# --- configuration and usage --------------------------------------------------------------------
_code("config.unreadable", Kind.CONFIG, "A configuration file is missing, unreadable or not TOML.")
_code("config.invalid", Kind.CONFIG, "A setting is unknown or its value is out of range; the path names it.")
_code(
    "config.secret_unreadable",
    Kind.CONFIG,
    "A file that a setting references for a secret is missing, empty or readable by others.",
)
_code("config.missing_extra", Kind.CONFIG, "This verb needs an optional part of pgherd that isn't installed.")
_code("usage.invalid", Kind.CONFIG, "An argument of a command or a request parameter is not acceptable.")

# --- runtime ------------------------------------------------------------------------------------
_code(
    "child.failed", Kind.PRECONDITION, "A child process exited with a failure status; its last stderr lines are in the context."
)
_code("child.warned", Kind.PRECONDITION, "A child process exited with 0 but wrote warnings that make its result incomplete.")
_code("child.timeout", Kind.TRANSIENT, "A child process didn't finish before its deadline and was ended.")
_code("child.missing", Kind.CONFIG, "A program that pgherd needs isn't installed at the stated or any usual path.")
_code("disk.full", Kind.TRANSIENT, "The file system has no room left for the write.")
_code("disk.io", Kind.TRANSIENT, "The operating system refused a read or write.")
_code("format.newer", Kind.INTEGRITY, "A file or store was written by a newer pgherd; this version refuses to touch it.")
_code("format.corrupt", Kind.INTEGRITY, "A file's content doesn't match its own checksum or structure.")
_code(
    "store.missing", Kind.PRECONDITION, "A store that was made once isn't where it should be; an empty one would hide the loss."
)
_code(
    "store.damaged",
    Kind.INTEGRITY,
    "A part of the series file is damaged, so this answer would lack samples; other series and times are served.",
    http=503,
)
_code("state.locked", Kind.PRECONDITION, "Another process holds the lock of this state directory or resource.")
_code("invariant.broken", Kind.INVARIANT, "An internal assumption of pgherd doesn't hold; please report it with the log line.")

# --- transport and identity ---------------------------------------------------------------------
_code("peer.unreachable", Kind.TRANSIENT, "The other side can't be reached.", exit_status=Exit.UNREACHABLE)
_code("peer.protocol", Kind.PEER, "The other side sent something that the protocol doesn't allow.")
_code("peer.untrusted", Kind.DENIED, "The other side's certificate isn't the one that was pinned or signed by the herd's CA.")
_code("peer.name_mismatch", Kind.DENIED, "The other side's certificate is the herd's, but not for the name that was dialled.")
_code("identity.missing", Kind.DENIED, "The call carries no client certificate of this herd.", grpc="UNAUTHENTICATED", http=401)
_code(
    "identity.expired",
    Kind.DENIED,
    "The client certificate has expired; renew it or join again.",
    grpc="UNAUTHENTICATED",
    http=401,
)
_code(
    "identity.revoked",
    Kind.DENIED,
    "The agent or its certificate has been revoked; join again with a new token.",
    grpc="UNAUTHENTICATED",
    http=401,
)
_code("identity.mismatch", Kind.DENIED, "The payload names an identity other than the certificate's.")
_code("ca.missing", Kind.PRECONDITION, "The collector has no certificate authority yet.")
_code("ca.exists", Kind.PRECONDITION, "The collector already has a certificate authority.")
_code("join.token_malformed", Kind.CONFIG, "The text isn't a join token: a part is missing or damaged.")
_code("join.token_invalid", Kind.DENIED, "The join token is unknown, withdrawn or its secret is wrong.", http=401)
_code("join.token_expired", Kind.DENIED, "The join token is past its time; make a new one.", http=401)
_code("join.token_used", Kind.DENIED, "The join token has been used before; each is good for one agent.", http=401)
_code("join.already_joined", Kind.PRECONDITION, "This state directory already holds an identity.")
_code("join.csr_invalid", Kind.PEER, "The certificate request is malformed or isn't signed by its own key.", http=400)
_code("renew.not_joined", Kind.PRECONDITION, "This state directory holds no identity to renew.")
_code("renew.grace_over", Kind.DENIED, "The certificate expired longer ago than the grace for renewals; join again.", http=401)
_code("renew.proof_invalid", Kind.DENIED, "The renewal isn't signed by the key of the certificate it renews.", http=401)
_code("enrol.busy", Kind.TRANSIENT, "Too many joins or renewals from this address; retry after the stated delay.", http=429)
_code("enrol.too_large", Kind.PEER, "The body of a join or renewal is over its limit.", http=413)
_code("auth.required", Kind.DENIED, "The request needs a bearer token or the local socket.", http=401)
_code("auth.invalid", Kind.DENIED, "The bearer token is unknown, expired or revoked.", http=401)
_code("auth.local_user", Kind.DENIED, "This local user may not use the collector's socket.", http=403)
_code("token.not_found", Kind.PRECONDITION, "No API token, or no unused join token, of that id exists.", http=404)
_code("auth.scope", Kind.DENIED, "The token's scope doesn't cover this request.", http=403)

# --- spool and shipping -------------------------------------------------------------------------
_code("spool.segment_corrupt", Kind.INTEGRITY, "A spool segment failed its checksum; it was set aside and counted as a gap.")
_code("ingest.malformed", Kind.PEER, "The OTLP request can't be decoded or names no allowed resource.", http=400)
_code("ingest.too_large", Kind.PEER, "The OTLP request is over the size or point limit.", grpc="RESOURCE_EXHAUSTED", http=413)
_code("ingest.unsupported", Kind.PEER, "The OTLP request's content type or compression isn't taken.", http=415)
_code(
    "ingest.quota", Kind.TRANSIENT, "This sender sends more than its share of the collector; retry after the delay.", http=429
)
_code("ingest.overloaded", Kind.TRANSIENT, "The collector's writer is behind; retry after the stated delay.", http=503)
_code(
    "store.unavailable",
    Kind.TRANSIENT,
    "The collector's store can't take the write now (disk full or shutting down).",
    http=503,
)

# --- PostgreSQL ---------------------------------------------------------------------------------
_code(
    "postgres.unreachable",
    Kind.TRANSIENT,
    "PostgreSQL doesn't accept connections at the configured address.",
    exit_status=Exit.UNREACHABLE,
)
_code("postgres.auth", Kind.CONFIG, "PostgreSQL refused the role or its password.", exit_status=Exit.DENIED)
_code("postgres.saturated", Kind.TRANSIENT, "PostgreSQL has no connection slot left for this role (SQLSTATE 53300); it is up.")
_code("postgres.timeout", Kind.TRANSIENT, "A statement hit its statement or lock timeout, or the server stopped answering.")
_code("postgres.privilege", Kind.CONFIG, "The role lacks a grant; the hint prints it.", exit_status=Exit.DENIED)
_code("postgres.failed", Kind.PRECONDITION, "PostgreSQL answered with an error; its SQLSTATE is in the context.")
_code("postgres.version", Kind.PRECONDITION, "The server's or client's major version is not usable for this.")
_code("postgres.binaries", Kind.CONFIG, "No PostgreSQL programs of a usable major version were found.")
_code("postgres.start_failed", Kind.PRECONDITION, "A scratch server didn't start; its log's last lines are in the context.")

# --- backups ------------------------------------------------------------------------------------
_code(
    "backup.incomplete",
    Kind.PRECONDITION,
    "The backup doesn't hold everything: a tool warned or something was unreadable. It never counts as verified.",
    exit_status=Exit.PARTIAL,
)
_code("backup.gave_way", Kind.TRANSIENT, "Somebody waited for a lock that the backup held, so the backup was ended.")
_code("backup.not_found", Kind.PRECONDITION, "No backup of that name exists in the repository.", http=404)
_code("backup.corrupt", Kind.INTEGRITY, "A part of the backup is missing or doesn't match its SHA-256.")
_code("backup.content_differs", Kind.INTEGRITY, "The restored content isn't equal to the fingerprint taken with the backup.")
_code(
    "backup.repository_foreign", Kind.INTEGRITY, "The repository holds backups of another cluster (system identifier differs)."
)
_code("object.exists", Kind.PRECONDITION, "The repository holds an object of that name; objects are never overwritten.")
_code("object.not_found", Kind.PRECONDITION, "The repository holds no object of that name.", http=404)
_code("restore.target_exists", Kind.PRECONDITION, "The restore target exists and isn't empty.")
_code("restore.outside_roots", Kind.DENIED, "The restore target isn't under one of the agent's restore_roots.")

# --- commands -----------------------------------------------------------------------------------
_code("command.denied", Kind.DENIED, "The agent's local policy doesn't allow this verb.")
_code(
    "command.needs_approval",
    Kind.DENIED,
    "The agent's local policy asks for an approval first.",
    exit_status=Exit.NEEDS_APPROVAL,
)
_code("command.not_found", Kind.PRECONDITION, "No command of that id exists.", http=404)
_code("command.expired", Kind.PRECONDITION, "The command's deadline passed before an agent accepted it.")
_code(
    "command.interrupted", Kind.TRANSIENT, "The agent was stopped while the command ran; nothing was published. Issue it again."
)
_code(
    "command.indeterminate",
    Kind.INTEGRITY,
    "A step that must not be repeated may or may not have happened; look before going on.",
)
_code("command.stale_epoch", Kind.DENIED, "The command carries an older epoch than the agent has already seen.")
_code("command.unsupported", Kind.PEER, "The agent doesn't know this verb.")
_code(
    "command.conflict",
    Kind.PRECONDITION,
    "The idempotency key was used for a different command, or an exclusive command is running.",
)
_code("node.not_found", Kind.PRECONDITION, "No node of that name or id is known.", http=404)
_code("agent.not_found", Kind.PRECONDITION, "No agent of that name or id is known.", http=404)

# --- queries and alerts -------------------------------------------------------------------------
_code("promql.parse", Kind.CONFIG, "The PromQL expression can't be parsed.", http=400)
_code(
    "promql.unsupported",
    Kind.CONFIG,
    "The PromQL expression is valid but uses a feature that this version doesn't evaluate.",
    http=422,
)
_code("promql.execution", Kind.PRECONDITION, "The PromQL expression can't be evaluated on this data.", http=422)
_code("promql.limit", Kind.PRECONDITION, "The query exceeds a limit on points, series or time.", http=422)
_code("query.timeout", Kind.TRANSIENT, "The query didn't finish within its timeout.", http=503)
_code("query.overloaded", Kind.TRANSIENT, "Too many queries are running and waiting; retry later.", http=503)
_code("rules.invalid", Kind.CONFIG, "A rule file isn't valid; file and line are in the message.", http=400)
_code(
    "alerts.duplicate",
    Kind.PRECONDITION,
    "Two elements of a rule's result have equal labels once the rule's labels are applied; the rule isn't evaluated.",
)
_code("alerts.limit", Kind.PRECONDITION, "A rule yields more alerts than its group's limit; the rule isn't evaluated.")
_code("silence.not_found", Kind.PRECONDITION, "No silence or maintenance window has this id.", http=404)
_code(
    "notify.failed",
    Kind.TRANSIENT,
    "A notification receiver refused or couldn't be reached; it stays in the outbox and is retried.",
)
