"""first tables"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=16), server_default="agent", nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("joined_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("revoked_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_heartbeat_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("skew_ns", sa.BigInteger(), nullable=True),
        sa.Column("round_trip_ns", sa.BigInteger(), nullable=True),
        sa.Column("software_version", sa.String(length=64), nullable=True),
        sa.Column("protocol_version", sa.Integer(), nullable=True),
        sa.Column("verbs_allowed", sa.JSON(), nullable=True),
        sa.Column("spool_bytes", sa.BigInteger(), nullable=True),
        sa.Column("spool_oldest_unix_ns", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("kind IN ('agent', 'client')", name=op.f("ck_agents_kind")),
        sa.CheckConstraint("status IN ('active', 'quarantined', 'revoked')", name=op.f("ck_agents_status")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agents")),
    )
    op.create_table(
        "alert_instances",
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("annotations", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("active_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("fired_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("resolved_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("keep_firing_since_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_evaluated_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("rule_id", "fingerprint", name=op.f("pk_alert_instances")),
    )
    op.create_table(
        "api_tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("created_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("revoked_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_used_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_used_from", sa.String(length=255), nullable=True),
        sa.CheckConstraint("scope IN ('viewer', 'operator', 'admin')", name=op.f("ck_api_tokens_scope")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_tokens")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("via", sa.String(length=32), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("used_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("used_by_agent_id", sa.String(length=36), nullable=True),
        sa.CheckConstraint("uses_left >= 0", name=op.f("ck_join_tokens_uses_left")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_join_tokens")),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=False),
        sa.Column("receiver", sa.String(length=255), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("created_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_attempt_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("delivered_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("given_up_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("idempotency_key", "receiver", name="uq_outbox_idempotency_key"),
    )
    op.create_table(
        "settings",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_settings")),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(length=64), nullable=False),
        sa.Column("agent_id", sa.String(length=36), nullable=False),
        sa.Column("not_before_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("not_after_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("issued_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("public_key_sha256", sa.String(length=64), nullable=False),
        sa.Column("replaced_by", sa.String(length=64), nullable=True),
        sa.Column("revoked_unix_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_certificates_agent_id_agents")),
        sa.PrimaryKeyConstraint("serial", name=op.f("pk_certificates")),
    )
    with op.batch_alter_table("certificates", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_certificates_agent_id"), ["agent_id"], unique=False)

    op.create_table(
        "nodes",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("agent_id", sa.String(length=36), nullable=False),
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("cluster", sa.String(length=255), nullable=False),
        sa.Column("system_identifier", sa.String(length=32), nullable=True),
        sa.Column("instance", sa.String(length=255), nullable=True),
        sa.Column("server_version_num", sa.Integer(), nullable=True),
        sa.Column("role", sa.String(length=16), server_default="unknown", nullable=False),
        sa.Column("condition", sa.String(length=16), server_default="unknown", nullable=False),
        sa.Column("first_seen_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("observed_unix_ns", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("role IN ('unknown', 'primary', 'standby')", name=op.f("ck_nodes_role")),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_nodes_agent_id_agents")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nodes")),
    )
    with op.batch_alter_table("nodes", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_nodes_agent_id"), ["agent_id"], unique=False)
        batch_op.create_index("ix_nodes_alias", ["alias"], unique=False)

    op.create_table(
        "backups",
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("system_identifier", sa.String(length=32), nullable=False),
        sa.Column("started_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("finished_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("databases", sa.JSON(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("grade", sa.String(length=16), nullable=False),
        sa.Column("graded_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("restore_duration_s", sa.Float(), nullable=True),
        sa.CheckConstraint("grade IN ('unproven', 'read back', 'checked', 'content-equal')", name=op.f("ck_backups_grade")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_backups_node_id_nodes")),
        sa.PrimaryKeyConstraint("node_id", "name", name=op.f("pk_backups")),
    )
    op.create_table(
        "commands",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("agent_id", sa.String(length=36), nullable=False),
        sa.Column("verb", sa.String(length=32), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("via", sa.String(length=32), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("issued_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("accept_deadline_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("offered_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("accepted_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("expired_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("forgotten_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("finished_unix_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_sequence", sa.Integer(), server_default="0", nullable=False),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_commands_node_id_nodes")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_commands_idempotency_key")),
        sa.UniqueConstraint("seq", name=op.f("uq_commands_seq")),
    )
    with op.batch_alter_table("commands", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_commands_agent_id"), ["agent_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_commands_node_id"), ["node_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_commands_state"), ["state"], unique=False)

    op.create_table(
        "command_events",
        sa.Column("command_id", sa.String(length=36), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("received_unix_ns", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["command_id"], ["commands.id"], name=op.f("fk_command_events_command_id_commands")),
        sa.PrimaryKeyConstraint("command_id", "sequence", name=op.f("pk_command_events")),
    )


def downgrade() -> None:
    op.drop_table("command_events")
    with op.batch_alter_table("commands", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_commands_state"))
        batch_op.drop_index(batch_op.f("ix_commands_node_id"))
        batch_op.drop_index(batch_op.f("ix_commands_agent_id"))

    op.drop_table("commands")
    op.drop_table("backups")
    with op.batch_alter_table("nodes", schema=None) as batch_op:
        batch_op.drop_index("ix_nodes_alias")
        batch_op.drop_index(batch_op.f("ix_nodes_agent_id"))

    op.drop_table("nodes")
    with op.batch_alter_table("certificates", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_certificates_agent_id"))

    op.drop_table("certificates")
    op.drop_table("settings")
    op.drop_table("outbox")
    op.drop_table("join_tokens")
    op.drop_table("audit")
    op.drop_table("api_tokens")
    op.drop_table("alert_instances")
    op.drop_table("agents")
