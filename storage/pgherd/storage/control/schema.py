"""Tables of the control store: what the collector must never forget.

Times are `*_unix_ns` (BIGINT, UTC). Ids are lower-case UUID text unless said otherwise. JSON columns hold
objects of stable shape. The Alembic revisions beside this file build the same tables; a test compares
the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

# The newest revision beside this file: a store that is there needs no migration (a test compares the two).
HEAD_REVISION = "0002"

# Constraint names from the first revision on: batch migrations on SQLite can't drop what has no name.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# One row per identity that may hold a certificate: agents, and foreign OTLP clients (kind "client").
agents = Table(
    "agents",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("kind", String(16), nullable=False, server_default="agent"),
    Column("name", String(255), nullable=False),
    Column("status", String(16), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("facts", JSON, nullable=False),  # hostname, machine id hash … as sent at joining
    Column("joined_unix_ns", BigInteger, nullable=False),
    Column("revoked_unix_ns", BigInteger),
    Column("last_heartbeat_unix_ns", BigInteger),
    Column("skew_ns", BigInteger),
    Column("round_trip_ns", BigInteger),
    Column("software_version", String(64)),
    Column("protocol_version", Integer),
    Column("verbs_allowed", JSON),
    Column("spool_bytes", BigInteger),
    Column("spool_oldest_unix_ns", BigInteger),
    CheckConstraint("kind IN ('agent', 'client')", name="kind"),
    CheckConstraint("status IN ('active', 'quarantined', 'revoked')", name="status"),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(64), primary_key=True),  # lower-case hexadecimal
    Column("agent_id", String(36), ForeignKey("agents.id"), nullable=False, index=True),
    Column("not_before_unix_ns", BigInteger, nullable=False),
    Column("not_after_unix_ns", BigInteger, nullable=False),
    Column("issued_unix_ns", BigInteger, nullable=False),
    Column("public_key_sha256", String(64), nullable=False),
    Column("replaced_by", String(64)),
    Column("revoked_unix_ns", BigInteger),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("created_unix_ns", BigInteger, nullable=False),
    Column("expires_unix_ns", BigInteger, nullable=False),
    Column("uses_left", Integer, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("name", String(255)),
    Column("actor", String(255), nullable=False),
    Column("used_unix_ns", BigInteger),
    Column("used_by_agent_id", String(36)),
    CheckConstraint("uses_left >= 0", name="uses_left"),
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("scope", String(16), nullable=False),
    Column("actor", String(255), nullable=False),  # who created it
    Column("created_unix_ns", BigInteger, nullable=False),
    Column("expires_unix_ns", BigInteger, nullable=False),
    Column("revoked_unix_ns", BigInteger),
    Column("last_used_unix_ns", BigInteger),
    Column("last_used_from", String(255)),
    CheckConstraint("scope IN ('viewer', 'operator', 'admin')", name="scope"),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("agent_id", String(36), ForeignKey("agents.id"), nullable=False, index=True),
    Column("alias", String(255), nullable=False),
    Column("cluster", String(255), nullable=False),
    Column("system_identifier", String(32)),
    Column("instance", String(255)),
    Column("server_version_num", Integer),
    Column("role", String(16), nullable=False, server_default="unknown"),
    Column("condition", String(16), nullable=False, server_default="unknown"),
    Column("first_seen_unix_ns", BigInteger, nullable=False),
    Column("observed_unix_ns", BigInteger),
    CheckConstraint("role IN ('unknown', 'primary', 'standby')", name="role"),
    Index("ix_nodes_alias", "alias"),
)

commands = Table(
    "commands",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("seq", Integer, nullable=False, unique=True),  # order of issue; cursor of listings
    Column("node_id", String(36), ForeignKey("nodes.id"), nullable=False, index=True),
    Column("agent_id", String(36), nullable=False, index=True),
    Column("verb", String(32), nullable=False),
    Column("arguments", JSON, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("via", String(32), nullable=False),
    Column("idempotency_key", String(255), unique=True),
    Column("epoch", BigInteger, nullable=False, server_default="0"),
    Column("issued_unix_ns", BigInteger, nullable=False),
    Column("accept_deadline_unix_ns", BigInteger, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("offered_unix_ns", BigInteger),
    Column("accepted_unix_ns", BigInteger),
    Column("expired_unix_ns", BigInteger),  # the deadline passed while the agent had said nothing
    Column("forgotten_unix_ns", BigInteger),  # the agent had accepted it and no longer knows it
    Column("finished_unix_ns", BigInteger),
    Column("last_sequence", Integer, nullable=False, server_default="0"),
    Column("progress", JSON),
    Column("result", JSON),
    Column("error", JSON),
)

command_events = Table(
    "command_events",
    metadata,
    Column("command_id", String(36), ForeignKey("commands.id"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("unix_ns", BigInteger, nullable=False),  # agent's clock
    Column("received_unix_ns", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),
)

backups = Table(
    "backups",
    metadata,
    Column("node_id", String(36), ForeignKey("nodes.id"), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("system_identifier", String(32), nullable=False),
    Column("started_unix_ns", BigInteger, nullable=False),
    Column("finished_unix_ns", BigInteger, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("databases", JSON, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("grade", String(16), nullable=False),
    Column("graded_unix_ns", BigInteger),
    Column("restore_duration_s", Float),
    CheckConstraint("grade IN ('unproven', 'read back', 'checked', 'content-equal')", name="grade"),
)

alert_instances = Table(
    "alert_instances",
    metadata,
    Column("rule_id", String(255), primary_key=True),  # group/alert name
    Column("fingerprint", String(64), primary_key=True),  # of the instance's labels
    Column("labels", JSON, nullable=False),
    Column("annotations", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("active_unix_ns", BigInteger, nullable=False),
    Column("fired_unix_ns", BigInteger),
    Column("resolved_unix_ns", BigInteger),
    Column("keep_firing_since_unix_ns", BigInteger),
    Column("last_evaluated_unix_ns", BigInteger, nullable=False),
    Column("value", Float),
    Column("detail", JSON, nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("idempotency_key", String(255), nullable=False),
    Column("receiver", String(255), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("created_unix_ns", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("next_attempt_unix_ns", BigInteger, nullable=False),
    Column("delivered_unix_ns", BigInteger),
    Column("given_up_unix_ns", BigInteger),
    Column("last_error", Text),
    UniqueConstraint("idempotency_key", "receiver", name="uq_outbox_idempotency_key"),
)

# What the receiver of a group of alerts knows.
notification_groups = Table(
    "notification_groups",
    metadata,
    Column("digest", String(16), primary_key=True),  # of receiver, route and group labels
    Column("receiver", String(255), nullable=False),
    Column("told", JSON, nullable=False),  # alert key → note, silenced
    Column("notified_unix_ns", BigInteger),
)

silences = Table(
    "silences",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("matchers", JSON, nullable=False),  # texts
    Column("starts_unix_ns", BigInteger, nullable=False),
    Column("ends_unix_ns", BigInteger, nullable=False),
    Column("created_unix_ns", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("comment", Text, nullable=False),
)

# Recurring windows in which alerts are mute.
maintenance_windows = Table(
    "maintenance_windows",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("matchers", JSON, nullable=False),  # texts
    Column("days", JSON, nullable=False),  # "mon" … "sun"
    Column("at", String(5), nullable=False),  # wall clock of the zone, "02:30"
    Column("duration_s", Float, nullable=False),
    Column("zone", String(64), nullable=False),  # IANA name
    Column("created_unix_ns", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("comment", Text, nullable=False),
)

# Append-only. What happened to identities, tokens and commands, and who did it.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("unix_ns", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("via", String(32), nullable=False),
    Column("action", String(64), nullable=False),  # constant dotted name
    Column("subject", String(255), nullable=False),
    Column("detail", JSON, nullable=False),
)

settings = Table(
    "settings",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)
