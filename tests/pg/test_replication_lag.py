"""Lag that can't lie: a real primary, a standby behind a link, a standby of that, in every phase, beside an independent truth.

PGHERD_NIGHTLY=1 repeats it on every installed major with longer phases.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.lag import Reading, all_phases, lines, table, watch
from support.postgres import Fleet, default_major, majors

pytestmark = [pytest.mark.pg, pytest.mark.slow]

NIGHTLY = bool(os.environ.get("PGHERD_NIGHTLY"))
SCALE = 4.0 if NIGHTLY else 1.0


@pytest.mark.timeout(900 if NIGHTLY else 180)
@pytest.mark.parametrize("major", majors() if NIGHTLY else [default_major()])
def test_every_phase_is_true_or_unknown(postgres_fleet: Fleet, tmp_path: Path, major: int) -> None:
    with watch(postgres_fleet, tmp_path, major) as (seen, link):
        all_phases(seen, link, SCALE)
        readings = seen.judged()
        primaries, broken = seen.last("pgherd_cluster_primaries"), seen.last("pgherd_replication_broken", node="standby")
    print(lines(table(readings)))

    def of(phase: str, node: str = "standby") -> list[Reading]:
        """The phase's readings that a lag or a reason was said at, without its first two ticks: they still see the last phase."""
        said = [one for one in readings if (one.phase, one.node) == (phase, node)][2:]
        return [one for one in said if one.ours_s is not None or one.unknown is not None]

    def known(phase: str, node: str = "standby") -> list[float]:
        values = [one.ours_s for one in of(phase, node)]
        assert values, phase
        assert None not in values, phase
        return [value for value in values if value is not None]

    # The promise: whatever is said is within max(1 s, 10 %) of the truth, in every phase, on every hop.
    assert [one for one in readings if not one.is_within_promise] == []
    assert len([one for one in readings if one.error_s is not None]) > len(readings) / 2

    for node in ("standby", "cascade"):
        assert set(known("idle", node)) == {0.0}
        assert max(known("streaming under load", node)) <= 1.0
    # A delay that is configured isn't lag: here the exporter's expression says the whole of it.
    assert max(known("delayed by configuration", "cascade")) <= 1.0
    assert max(one.exporter_s or 0 for one in of("delayed by configuration", "cascade")) > 2
    assert set(known("delayed, then idle", "cascade")[-1:]) == {0.0}
    # Replay stands still: a reader of this standby sees the past, its cascade leads it.
    assert known("replay paused")[-1] > 2
    assert max(known("replay paused", "cascade")) <= 1.0
    # A link that is cut, and one that only went deaf: the lag grows on both hops, where others say 0.
    for phase in ("link cut, writes go on", "link deaf, writes go on"):
        for node in ("standby", "cascade"):
            lags = known(phase, node)
            assert lags == sorted(lags)
            assert lags[-1] > 2
            assert all(one.exporter_s == 0 for one in of(phase, node))
    assert {one.broken for one in of("link cut, writes go on")} == {1.0}
    # Nothing is committed: not behind, but broken; a checkpoint's WAL counts in bytes only.
    assert set(known("link cut, idle")) == {0.0}
    assert (of("link cut, idle")[-1].wal_bytes or 0) > 0
    assert {one.broken for one in of("link cut, idle")} == {1.0}
    assert {one.broken for one in of("link cut, idle", "cascade")} == {0.0}
    # Dead: no number, whatever the positions look like.
    for node in ("standby", "cascade"):
        assert {(one.ours_s, one.unknown) for one in of("primary dead", node)} == {(None, "primary_silent")}
    # The next primary: the standby's series end, the cascade follows it.
    assert max(known("after the promotion", "cascade")) <= 1.0
    assert not [one for one in readings if one.phase == "after the promotion" and one.node == "standby"]
    assert (primaries, broken) == (1.0, None)
