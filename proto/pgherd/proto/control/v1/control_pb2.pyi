from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNKNOWN: _ClassVar[Role]
    ROLE_PRIMARY: _ClassVar[Role]
    ROLE_STANDBY: _ClassVar[Role]

class Condition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONDITION_UNKNOWN: _ClassVar[Condition]
    CONDITION_UP: _ClassVar[Condition]
    CONDITION_DOWN: _ClassVar[Condition]
    CONDITION_SATURATED: _ClassVar[Condition]
    CONDITION_AUTH_FAILED: _ClassVar[Condition]
    CONDITION_HUNG: _ClassVar[Condition]

class Grade(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRADE_UNPROVEN: _ClassVar[Grade]
    GRADE_READ_BACK: _ClassVar[Grade]
    GRADE_CHECKED: _ClassVar[Grade]
    GRADE_CONTENT_EQUAL: _ClassVar[Grade]
ROLE_UNKNOWN: Role
ROLE_PRIMARY: Role
ROLE_STANDBY: Role
CONDITION_UNKNOWN: Condition
CONDITION_UP: Condition
CONDITION_DOWN: Condition
CONDITION_SATURATED: Condition
CONDITION_AUTH_FAILED: Condition
CONDITION_HUNG: Condition
GRADE_UNPROVEN: Grade
GRADE_READ_BACK: Grade
GRADE_CHECKED: Grade
GRADE_CONTENT_EQUAL: Grade

class AgentMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "command_event")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_EVENT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    command_event: CommandEvent
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., command_event: _Optional[_Union[CommandEvent, _Mapping]] = ...) -> None: ...

class CollectorMessage(_message.Message):
    __slots__ = ("welcome", "heartbeat_ack", "command_offer", "command_event_ack")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_ACK_FIELD_NUMBER: _ClassVar[int]
    COMMAND_OFFER_FIELD_NUMBER: _ClassVar[int]
    COMMAND_EVENT_ACK_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    heartbeat_ack: HeartbeatAck
    command_offer: CommandOffer
    command_event_ack: CommandEventAck
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat_ack: _Optional[_Union[HeartbeatAck, _Mapping]] = ..., command_offer: _Optional[_Union[CommandOffer, _Mapping]] = ..., command_event_ack: _Optional[_Union[CommandEventAck, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("agent_id", "protocol_version", "software_version", "hostname", "nodes", "unfinished", "verbs_allowed")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    VERBS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    protocol_version: int
    software_version: str
    hostname: str
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    unfinished: _containers.RepeatedCompositeFieldContainer[UnfinishedCommand]
    verbs_allowed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., hostname: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., unfinished: _Optional[_Iterable[_Union[UnfinishedCommand, _Mapping]]] = ..., verbs_allowed: _Optional[_Iterable[str]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("node_id", "alias", "cluster", "system_identifier", "instance", "server_version_num", "role", "condition")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_NUM_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    alias: str
    cluster: str
    system_identifier: str
    instance: str
    server_version_num: int
    role: Role
    condition: Condition
    def __init__(self, node_id: _Optional[str] = ..., alias: _Optional[str] = ..., cluster: _Optional[str] = ..., system_identifier: _Optional[str] = ..., instance: _Optional[str] = ..., server_version_num: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., condition: _Optional[_Union[Condition, str]] = ...) -> None: ...

class UnfinishedCommand(_message.Message):
    __slots__ = ("command_id", "last_sequence")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    command_id: str
    last_sequence: int
    def __init__(self, command_id: _Optional[str] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("collector_version", "protocol_version", "heartbeat_interval_ms", "sent_unix_ns")
    COLLECTOR_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    collector_version: str
    protocol_version: int
    heartbeat_interval_ms: int
    sent_unix_ns: int
    def __init__(self, collector_version: _Optional[str] = ..., protocol_version: _Optional[int] = ..., heartbeat_interval_ms: _Optional[int] = ..., sent_unix_ns: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sent_unix_ns", "nodes", "spool_bytes", "spool_oldest_unix_ns", "skew_ns", "round_trip_ns")
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_OLDEST_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    SKEW_NS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_NS_FIELD_NUMBER: _ClassVar[int]
    sent_unix_ns: int
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    spool_bytes: int
    spool_oldest_unix_ns: int
    skew_ns: int
    round_trip_ns: int
    def __init__(self, sent_unix_ns: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., spool_bytes: _Optional[int] = ..., spool_oldest_unix_ns: _Optional[int] = ..., skew_ns: _Optional[int] = ..., round_trip_ns: _Optional[int] = ...) -> None: ...

class HeartbeatAck(_message.Message):
    __slots__ = ("heartbeat_sent_unix_ns", "received_unix_ns", "sent_unix_ns")
    HEARTBEAT_SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    heartbeat_sent_unix_ns: int
    received_unix_ns: int
    sent_unix_ns: int
    def __init__(self, heartbeat_sent_unix_ns: _Optional[int] = ..., received_unix_ns: _Optional[int] = ..., sent_unix_ns: _Optional[int] = ...) -> None: ...

class CommandOffer(_message.Message):
    __slots__ = ("command_id", "node_id", "issued_unix_ns", "accept_within_ms", "epoch", "actor", "ping", "backup_run", "backup_verify", "restore", "diagnostics")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    BACKUP_RUN_FIELD_NUMBER: _ClassVar[int]
    BACKUP_VERIFY_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    DIAGNOSTICS_FIELD_NUMBER: _ClassVar[int]
    command_id: str
    node_id: str
    issued_unix_ns: int
    accept_within_ms: int
    epoch: int
    actor: str
    ping: Ping
    backup_run: BackupRun
    backup_verify: BackupVerify
    restore: Restore
    diagnostics: Diagnostics
    def __init__(self, command_id: _Optional[str] = ..., node_id: _Optional[str] = ..., issued_unix_ns: _Optional[int] = ..., accept_within_ms: _Optional[int] = ..., epoch: _Optional[int] = ..., actor: _Optional[str] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., backup_run: _Optional[_Union[BackupRun, _Mapping]] = ..., backup_verify: _Optional[_Union[BackupVerify, _Mapping]] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ..., diagnostics: _Optional[_Union[Diagnostics, _Mapping]] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BackupRun(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BackupVerify(_message.Message):
    __slots__ = ("backup",)
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    backup: str
    def __init__(self, backup: _Optional[str] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("backup", "scratch_server", "new_directory")
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    SCRATCH_SERVER_FIELD_NUMBER: _ClassVar[int]
    NEW_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    backup: str
    scratch_server: ScratchServer
    new_directory: NewDirectory
    def __init__(self, backup: _Optional[str] = ..., scratch_server: _Optional[_Union[ScratchServer, _Mapping]] = ..., new_directory: _Optional[_Union[NewDirectory, _Mapping]] = ...) -> None: ...

class ScratchServer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NewDirectory(_message.Message):
    __slots__ = ("root", "name")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    root: str
    name: str
    def __init__(self, root: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Diagnostics(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommandEvent(_message.Message):
    __slots__ = ("command_id", "sequence", "unix_ns", "accepted", "rejected", "progress", "succeeded", "failed", "indeterminate")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    INDETERMINATE_FIELD_NUMBER: _ClassVar[int]
    command_id: str
    sequence: int
    unix_ns: int
    accepted: Accepted
    rejected: Rejected
    progress: Progress
    succeeded: Succeeded
    failed: Failed
    indeterminate: Indeterminate
    def __init__(self, command_id: _Optional[str] = ..., sequence: _Optional[int] = ..., unix_ns: _Optional[int] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., succeeded: _Optional[_Union[Succeeded, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., indeterminate: _Optional[_Union[Indeterminate, _Mapping]] = ...) -> None: ...

class CommandEventAck(_message.Message):
    __slots__ = ("command_id", "sequence")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    command_id: str
    sequence: int
    def __init__(self, command_id: _Optional[str] = ..., sequence: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("issued_here",)
    ISSUED_HERE_FIELD_NUMBER: _ClassVar[int]
    issued_here: CommandOffer
    def __init__(self, issued_here: _Optional[_Union[CommandOffer, _Mapping]] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("phase", "done", "total", "unit")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    phase: str
    done: int
    total: int
    unit: str
    def __init__(self, phase: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., unit: _Optional[str] = ...) -> None: ...

class Succeeded(_message.Message):
    __slots__ = ("ping", "backup_run", "backup_verify", "restore", "diagnostics")
    PING_FIELD_NUMBER: _ClassVar[int]
    BACKUP_RUN_FIELD_NUMBER: _ClassVar[int]
    BACKUP_VERIFY_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    DIAGNOSTICS_FIELD_NUMBER: _ClassVar[int]
    ping: PingResult
    backup_run: BackupResult
    backup_verify: VerifyResult
    restore: RestoreResult
    diagnostics: DiagnosticsResult
    def __init__(self, ping: _Optional[_Union[PingResult, _Mapping]] = ..., backup_run: _Optional[_Union[BackupResult, _Mapping]] = ..., backup_verify: _Optional[_Union[VerifyResult, _Mapping]] = ..., restore: _Optional[_Union[RestoreResult, _Mapping]] = ..., diagnostics: _Optional[_Union[DiagnosticsResult, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Indeterminate(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "hint", "context")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    context: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., context: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PingResult(_message.Message):
    __slots__ = ("agent_unix_ns",)
    AGENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    agent_unix_ns: int
    def __init__(self, agent_unix_ns: _Optional[int] = ...) -> None: ...

class BackupResult(_message.Message):
    __slots__ = ("backup",)
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    backup: BackupSummary
    def __init__(self, backup: _Optional[_Union[BackupSummary, _Mapping]] = ...) -> None: ...

class BackupSummary(_message.Message):
    __slots__ = ("name", "node_id", "system_identifier", "started_unix_ns", "finished_unix_ns", "stored_bytes", "databases", "complete", "warnings", "grade")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATABASES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    GRADE_FIELD_NUMBER: _ClassVar[int]
    name: str
    node_id: str
    system_identifier: str
    started_unix_ns: int
    finished_unix_ns: int
    stored_bytes: int
    databases: _containers.RepeatedScalarFieldContainer[str]
    complete: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    grade: Grade
    def __init__(self, name: _Optional[str] = ..., node_id: _Optional[str] = ..., system_identifier: _Optional[str] = ..., started_unix_ns: _Optional[int] = ..., finished_unix_ns: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., databases: _Optional[_Iterable[str]] = ..., complete: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ..., grade: _Optional[_Union[Grade, str]] = ...) -> None: ...

class VerifyResult(_message.Message):
    __slots__ = ("backup", "grade", "read_bytes", "duration_s")
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    GRADE_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    backup: str
    grade: Grade
    read_bytes: int
    duration_s: float
    def __init__(self, backup: _Optional[str] = ..., grade: _Optional[_Union[Grade, str]] = ..., read_bytes: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class RestoreResult(_message.Message):
    __slots__ = ("backup", "grade", "tables_compared", "rows_compared", "duration_s", "directory")
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    GRADE_FIELD_NUMBER: _ClassVar[int]
    TABLES_COMPARED_FIELD_NUMBER: _ClassVar[int]
    ROWS_COMPARED_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    backup: str
    grade: Grade
    tables_compared: int
    rows_compared: int
    duration_s: float
    directory: str
    def __init__(self, backup: _Optional[str] = ..., grade: _Optional[_Union[Grade, str]] = ..., tables_compared: _Optional[int] = ..., rows_compared: _Optional[int] = ..., duration_s: _Optional[float] = ..., directory: _Optional[str] = ...) -> None: ...

class DiagnosticsResult(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("check", "severity", "message", "remedy")
    CHECK_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    check: str
    severity: str
    message: str
    remedy: str
    def __init__(self, check: _Optional[str] = ..., severity: _Optional[str] = ..., message: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...
