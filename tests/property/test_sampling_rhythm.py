"""When probes are asked, and how series end when their source falls silent: pure parts under any order of events."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.probes.rhythm import PAUSE_MAX_S, Rhythm
from pgherd.agent.telemetry.convert import Source
from pgherd.agent.telemetry.emit import INDEPENDENT, Emitter
from pgherd.proto.samples import Metric, MetricKind, Sample
from support.sampling import decode
from support.spooling import open_spool

INTERVALS = {"live": 1.0, "cycle": 10.0, "slow": 60.0}
PROBE = load_catalog().for_major(18)[0]


@given(
    tier=st.sampled_from(sorted(INTERVALS)),
    steps=st.lists(st.tuples(st.floats(0.9, 1.4), st.booleans()), min_size=1, max_size=300),
)
def test_a_probe_keeps_its_interval_and_a_timeout_never_silences_it_for_long(
    tier: str, steps: list[tuple[float, bool]]
) -> None:
    rhythm = Rhythm(INTERVALS)
    probe = replace(PROBE, tier=tier)  # type: ignore[arg-type]
    now, last, asked = 1000.0, 1000.0, []
    for step, works in steps:
        if rhythm.due([probe], now):
            asked.append(now)
            (rhythm.answered if works else rhythm.timed_out)(probe, now)
            last = now
        assert now - last <= max(PAUSE_MAX_S, INTERVALS[tier]) + 2.0
        now += step
    for before, after in zip(asked, asked[2:], strict=False):
        assert after - before >= 2 * INTERVALS[tier] - 2 * 1.0, "two intervals hold at most two askings more"


def test_repeated_timeouts_are_asked_ever_more_rarely_until_one_answer() -> None:
    rhythm, probe = Rhythm(INTERVALS), replace(PROBE, tier="cycle")
    asked: list[float] = []
    for second in range(1000):
        if rhythm.due([probe], float(second)):
            asked.append(float(second))
            rhythm.timed_out(probe, float(second))
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps[0] == 10.0
    assert gaps == sorted(gaps)
    assert gaps[-1] == PAUSE_MAX_S
    answered = asked[-1] + PAUSE_MAX_S
    assert rhythm.due([probe], answered)
    rhythm.answered(probe, answered)
    assert not rhythm.due([probe], answered + 5.0)
    assert rhythm.due([probe], answered + 10.0)


LETTERS = "abcd"
METRICS = {letter: Metric(f"m_{letter}", MetricKind.GAUGE, "h") for letter in LETTERS}
SOURCES = ["one", "two", "agent"]


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(
        st.dictionaries(st.sampled_from(SOURCES), st.sets(st.sampled_from(LETTERS)), min_size=1, max_size=3),
        min_size=1,
        max_size=8,
    )
)
def test_every_series_ends_once_and_only_by_its_own_source(batches: list[dict[str, set[str]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        spool = open_spool(Path(directory), size_max=1 << 24, segment_max=1 << 18)
        emitter = Emitter(Source("a", "n", "n", "c", "i"), spool)
        alive: dict[str, set[str]] = {}

        async def work() -> None:
            for number, batch in enumerate(batches, 1):
                statement = {
                    source: [Sample(METRICS[letter], {"source": source}, 1.0) for letter in letters]
                    for source, letters in batch.items()
                }
                ended = {(source, x) for source in batch for x in alive.get(source, set()) - batch[source]}
                await emitter.emit(statement, number)
                alive.update({source: set(letters) for source, letters in batch.items()})
                spooled = spool.head()
                points = [] if spooled is None else decode(spooled.payload).points
                assert {(p.labels["source"], p.name[-1]) for p in points if p.stale} == ended
                assert {(p.labels["source"], p.name[-1]) for p in points if not p.stale} == {
                    (source, letter) for source, letters in batch.items() for letter in letters
                }
                assert {p.unix_ns for p in points} <= {number}
                assert emitter.about_server() == {s for s, letters in alive.items() if letters} - INDEPENDENT
                if spooled is not None:
                    spool.release(spooled, "acked")

        asyncio.run(work())
        spool.close()
