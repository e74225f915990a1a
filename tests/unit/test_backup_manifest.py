"""Manifests, proofs, grades and names; fingerprints as values."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pgherd.postgres.control_data import parse
from pgherd.postgres.fingerprint import Digest, Fingerprint, SequenceState, TableContent, differences, obstacles
from pgherd.proto.errors import IntegrityError
from pgherd.storage.manifest import (
    Database,
    Extension,
    Manifest,
    Part,
    Proof,
    Tablespace,
    backup_name,
    grade,
    is_backup_name,
    manifest_sha256,
    parse_manifest,
    parse_proof,
    proof_name,
    proof_number,
)

MANIFEST = Manifest(
    name="20261123T180000.123Z-1a2b",
    ordinal=7,
    cluster="shop",
    node="n1",
    node_id="00000000-0000-0000-0000-000000000001",
    system_identifier="7711440248691694925",
    server_version_num=150018,
    server_version="15.18",
    from_standby=False,
    bootstrap_superuser="postgres",
    started_unix_ns=1,
    finished_unix_ns=2,
    pgherd_version="0.1.0",
    tools={"pg_dump": "pg_dump (PostgreSQL) 15.18"},
    tools_major=15,
    complete=True,
    warnings=(),
    notes=("ü",),
    role_passwords=True,
    data_checksums=True,
    databases=(
        Database(
            "shop", "db-001-shop.dump.zst", "app", "UTF8", "c", "C", "C", "", "", "0/1", (Extension("plpgsql", "1.0"),), 3, 9
        ),
    ),
    databases_left_out={},
    tablespaces=(Tablespace("fast", "app", "/x"),),
    parts=(Part("db-001-shop.dump.zst", "database", "zstd", 10, "ab", 20, "cd"),),
)
CONTENT = MANIFEST.serialise()
SHA256 = manifest_sha256(CONTENT)


def _proof(the_grade: str, error: str = "", sha256: str = SHA256) -> Proof:
    return Proof(MANIFEST.name, sha256, the_grade, 5, 1.5, 10, error=error)


def test_a_manifest_survives_writing_and_reading() -> None:
    assert parse_manifest(CONTENT, "m") == MANIFEST
    proof = _proof("checked")
    assert parse_proof(proof.serialise(), "p") == proof


def _believed(content: bytes) -> Manifest | None:
    try:
        return parse_manifest(content, "m")
    except IntegrityError:
        return None


@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_a_flipped_bit_of_a_manifest_changes_nothing_that_is_believed(bit: int) -> None:
    """Refused, or the very same document (the case of an escape's digits)."""
    for position in range(len(CONTENT)):
        damaged = bytearray(CONTENT)
        damaged[position] ^= 1 << bit
        assert _believed(bytes(damaged)) in (None, MANIFEST)


def test_a_newer_manifest_is_refused_by_name() -> None:
    document = json.loads(CONTENT)
    document["version"] = 2
    with pytest.raises(IntegrityError, match="format version 2") as caught:
        parse_manifest(json.dumps(document).encode(), "somewhere/manifest.json")
    assert caught.value.code == "format.newer"


@pytest.mark.parametrize(
    ("proofs", "expected"),
    [
        ([], "unproven"),
        (["read back"], "read back"),
        (["read back", "content-equal", "read back"], "content-equal"),
        (["content-equal", "!"], "unproven"),
        (["content-equal", "!", "read back"], "read back"),
        (["?content-equal"], "unproven"),
    ],
)
def test_a_grade_follows_from_the_proofs_in_order(proofs: list[str], expected: str) -> None:
    """`!` failed, `?` is about another manifest."""
    made = [
        _proof("unproven", "backup.corrupt")
        if text == "!"
        else _proof(text.lstrip("?"), sha256="x" if text[0] == "?" else SHA256)
        for text in proofs
    ]
    assert grade(MANIFEST, SHA256, made) == expected
    assert grade(dataclasses.replace(MANIFEST, complete=False), SHA256, made) == "unproven"


def test_names() -> None:
    name = backup_name(1795459598370286124, "7887")
    assert name == "20261123T184638.370Z-7887"
    assert is_backup_name(name)
    assert not is_backup_name("../" + name)
    assert proof_number(proof_name(12)) == 12
    assert proof_number("manifest.json") is None


def test_controldata_labels() -> None:
    assert parse("Database system identifier:           77\nTime of latest checkpoint:  Mon 10:00:00\n") == {
        "Database system identifier": "77",
        "Time of latest checkpoint": "Mon 10:00:00",
    }


FINGERPRINT = Fingerprint(
    database="shop",
    server_major=15,
    encoding="UTF8",
    collations={"default": "2.36"},
    tables={"public.t": TableContent((("a", "integer"),), Digest(2, 5, 6))},
    sequences={"public.s": SequenceState(10, True, 1, False)},
    large_objects=Digest(0, 0, 0),
    inventory={"types": Digest(1, 2, 3)},
    skipped={},
)


def test_a_fingerprint_survives_json() -> None:
    assert Fingerprint.from_json(json.loads(json.dumps(FINGERPRINT.to_json()))) == FINGERPRINT
    for key, value in (("algorithm", "other/2"), ("version", 2)):
        with pytest.raises(IntegrityError) as caught:
            Fingerprint.from_json({**FINGERPRINT.to_json(), key: value})
        assert caught.value.code == "format.newer"
    with pytest.raises(IntegrityError) as caught:
        Fingerprint.from_json({**FINGERPRINT.to_json(), "tables": 3})
    assert caught.value.code == "format.corrupt"


def test_sequences_may_be_ahead_but_not_behind() -> None:
    recorded = SequenceState(10, True, 1, False)
    assert SequenceState(10, True, 1, False).not_behind(recorded)
    assert SequenceState(11, False, 1, False).not_behind(recorded)
    assert SequenceState(37, True, 1, False).not_behind(recorded)
    assert not SequenceState(10, False, 1, False).not_behind(recorded)
    assert not SequenceState(9, True, 1, False).not_behind(recorded)
    assert SequenceState(-7, True, -3, False).not_behind(SequenceState(-4, True, -3, False))
    assert not SequenceState(-4, True, -3, False).not_behind(SequenceState(-7, True, -3, False))


def test_other_collations_make_contents_incomparable_not_different() -> None:
    other = dataclasses.replace(FINGERPRINT, collations={"default": "2.31"}, server_major=17)
    assert len(obstacles(FINGERPRINT, other)) == 2
    assert differences(FINGERPRINT, other) == []
