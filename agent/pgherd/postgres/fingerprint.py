"""The content fingerprint of a database, as a value: model, comparison, JSON (format v1). Pure.

Properties (docs/formats/fingerprint-v1.md says why):
 1. Equal content gives equal fingerprints, whatever the physical order, partition or page a row lies in.
 2. Any change that a text dump would show (a bit, 1.0 → 1.00, 0.0 → -0.0) changes a digest, but for
    hash collisions of 2 x 64 bits.
 3. Derived data (generated columns, materialised views, indexes) isn't content; sequences may only be ahead.
 4. Nothing is left out silently: what isn't digested is listed in `skipped` with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pgherd.proto.errors import IntegrityError

FORMAT = "pgherd.fingerprint"
VERSION = 1
ALGORITHM = "rowtext-hashtextextended-2x64/1"
_MODULUS = 1 << 64


@dataclass(frozen=True, slots=True)
class Digest:
    """Order-independent digest of a bag of texts: how many, and two sums of differently seeded 64-bit hashes."""

    rows: int
    sum_a: int
    sum_b: int

    def __add__(self, other: Digest) -> Digest:
        """The digest of both bags together: a partitioned table is the sum of its leaves."""
        return Digest(self.rows + other.rows, (self.sum_a + other.sum_a) % _MODULUS, (self.sum_b + other.sum_b) % _MODULUS)

    @classmethod
    def of_sums(cls, rows: int, sum_a: int | None, sum_b: int | None) -> Digest:
        """From SQL's count and signed sums (None for no rows)."""
        return cls(rows, int(sum_a or 0) % _MODULUS, int(sum_b or 0) % _MODULUS)

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "hash": f"{self.sum_a:016x}{self.sum_b:016x}"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Digest:
        text = str(data["hash"])
        if len(text) != 32:
            raise ValueError("a hash has 32 hexadecimal digits")
        return cls(int(data["rows"]), int(text[:16], 16), int(text[16:], 16))


EMPTY = Digest(0, 0, 0)


@dataclass(frozen=True, slots=True)
class TableContent:
    """One table (a partitioned one as a whole): columns as (name, type) sorted by name, and its digest."""

    columns: tuple[tuple[str, str], ...]
    digest: Digest


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A sequence: not transactional, so a copy taken under a snapshot may be ahead, never behind."""

    last_value: int
    is_called: bool
    increment: int
    cycles: bool

    @property
    def _position(self) -> int:
        return self.last_value + (self.increment if self.is_called else 0)

    def not_behind(self, recorded: SequenceState) -> bool:
        """Whether this state hands out no value that `recorded` had handed out already."""
        if self.increment != recorded.increment or self.cycles != recorded.cycles:
            return False
        if recorded.cycles:
            return True
        return self._position >= recorded._position if recorded.increment > 0 else self._position <= recorded._position


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The content of one database at one snapshot. Names of tables and sequences are quoted and qualified.

    `inventory` maps a kind of object to the digest of its objects' names. `collations` maps a collation
    (the database's own is "default") to the version of its provider, "" where it has none.
    """

    database: str
    server_major: int
    encoding: str
    collations: Mapping[str, str]
    tables: Mapping[str, TableContent]
    sequences: Mapping[str, SequenceState]
    large_objects: Digest
    inventory: Mapping[str, Digest]
    skipped: Mapping[str, str]  # name → reason

    @property
    def rows(self) -> int:
        return sum(table.digest.rows for table in self.tables.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "algorithm": ALGORITHM,
            "database": self.database,
            "server_major": self.server_major,
            "encoding": self.encoding,
            "collations": dict(self.collations),
            "tables": {
                name: {"columns": [list(column) for column in table.columns], **table.digest.to_json()}
                for name, table in self.tables.items()
            },
            "sequences": {
                name: [sequence.last_value, sequence.is_called, sequence.increment, sequence.cycles]
                for name, sequence in self.sequences.items()
            },
            "large_objects": self.large_objects.to_json(),
            "inventory": {kind: digest.to_json() for kind, digest in self.inventory.items()},
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Raises IntegrityError format.newer (version or algorithm) | format.corrupt."""
        if data.get("format") != FORMAT or not isinstance(data.get("version"), int):
            raise IntegrityError("format.corrupt", "this isn't a fingerprint")
        if data["version"] > VERSION or data.get("algorithm") != ALGORITHM:
            raise IntegrityError(
                "format.newer",
                f"the fingerprint has version {data['version']}, algorithm {data.get('algorithm')}; this pgherd reads {VERSION}, {ALGORITHM}",
                hint="run the pgherd version that wrote it, or a newer one",
            )
        try:
            return cls(
                database=str(data["database"]),
                server_major=int(data["server_major"]),
                encoding=str(data["encoding"]),
                collations={str(k): str(v) for k, v in data["collations"].items()},
                tables={
                    str(name): TableContent(
                        tuple(cast(tuple[str, str], tuple(column)) for column in table["columns"]), Digest.from_json(table)
                    )
                    for name, table in data["tables"].items()
                },
                sequences={str(name): SequenceState(*sequence) for name, sequence in data["sequences"].items()},
                large_objects=Digest.from_json(data["large_objects"]),
                inventory={str(kind): Digest.from_json(digest) for kind, digest in data["inventory"].items()},
                skipped={str(k): str(v) for k, v in data["skipped"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError("format.corrupt", f"the fingerprint's structure is damaged: {error}") from error


def obstacles(recorded: Fingerprint, restored: Fingerprint) -> list[str]:
    """Why the two can't be compared at all, as sentences; empty when they can.

    Another major may write types differently; another collation version sorts differently, so that
    range partitions, indexes and constraints on text may not mean the same.
    """
    found = []
    if recorded.server_major != restored.server_major:
        found.append(f"server major {restored.server_major} instead of {recorded.server_major}")
    for name, version in recorded.collations.items():
        other = restored.collations.get(name)
        if other != version:
            found.append(f"collation {name} has version {other or 'none'} instead of {version or 'none'}")
    return found


def differences(recorded: Fingerprint, restored: Fingerprint) -> list[str]:
    """What makes `restored` unequal to `recorded`, as sentences; empty when the content is equal."""
    return list(_differences(recorded, restored))


def _differences(recorded: Fingerprint, restored: Fingerprint) -> Iterator[str]:
    if recorded.encoding != restored.encoding:
        yield f"encoding {restored.encoding} instead of {recorded.encoding}"
    yield from _table_differences(recorded, restored)
    for name, sequence in recorded.sequences.items():
        other = restored.sequences.get(name)
        if other is None:
            yield f"sequence {name} is missing"
        elif not other.not_behind(sequence):
            yield f"sequence {name} stands at {other.last_value}, behind {sequence.last_value}"
    yield from (
        f"sequence {name} wasn't in the original" for name in sorted(restored.sequences.keys() - recorded.sequences.keys())
    )
    if recorded.large_objects != restored.large_objects:
        yield f"large objects differ ({restored.large_objects.rows} instead of {recorded.large_objects.rows})"
    for kind in sorted(recorded.inventory.keys() | restored.inventory.keys()):
        before, after = recorded.inventory.get(kind, EMPTY), restored.inventory.get(kind, EMPTY)
        if before != after:
            yield f"{kind} differ ({after.rows} instead of {before.rows})"


def _table_differences(recorded: Fingerprint, restored: Fingerprint) -> Iterator[str]:
    for name, table in recorded.tables.items():
        other = restored.tables.get(name)
        if other is None:
            yield f"table {name} is missing"
        elif other.columns != table.columns:
            yield f"table {name} has other columns"
        elif other.digest.rows != table.digest.rows:
            yield f"table {name} has {other.digest.rows} rows instead of {table.digest.rows}"
        elif other.digest != table.digest:
            yield f"table {name} has the same {table.digest.rows} rows by number, but their content differs"
    # What couldn't be read then (an unlogged table on a standby) can't be judged now.
    new = restored.tables.keys() - recorded.tables.keys() - recorded.skipped.keys()
    yield from (f"table {name} wasn't in the original" for name in sorted(new))
