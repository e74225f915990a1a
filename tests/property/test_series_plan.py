"""Group commit: whatever arrives in whatever grouping, each sequence is stored once."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.storage.series.batch import Batch, labels_of
from pgherd.storage.series.catalog import Catalog, labels_from_json, labels_to_json
from pgherd.storage.series.index import SeriesIndex
from pgherd.storage.series.plan import SeriesLimits, plan_commit
from support.series import BASE_MS, batch, layout

LAYOUTS = [layout(n, f"m{n}") for n in range(1, 6)]
ARRIVALS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 8), st.integers(0, 4)), max_size=30)


@given(arrivals=ARRIVALS, cuts=st.sets(st.integers(1, 29)), series_max=st.integers(0, 20))
def test_each_sequence_is_stored_once_however_the_commits_are_cut(
    arrivals: list[tuple[str, int, int]], cuts: set[int], series_max: int
) -> None:
    catalog = Catalog()
    seen: dict[str, list[int]] = {"a": [], "b": []}
    stored: dict[str, int] = {"a": 0, "b": 0}
    edges = [0, *sorted(c for c in cuts if c < len(arrivals)), len(arrivals)]
    for low, high in itertools.pairwise(edges):
        group = arrivals[low:high]
        batches = [batch(LAYOUTS[n], BASE_MS, [float(s)] * (n + 1), s, agent=agent) for agent, s, n in group]
        plan = plan_commit(batches, catalog.known(), limits=SeriesLimits(series_max, series_max), now_unix_ms=BASE_MS)
        for (agent, sequence, n), receipt in zip(group, plan.receipts, strict=True):
            high_water = max(seen[agent], default=0)
            assert receipt.repeated == (sequence <= high_water)
            if receipt.repeated:
                assert receipt.stored_points == 0
                continue
            assert receipt.gap == sequence - high_water - 1
            assert receipt.stored_points + receipt.points_refused == n + 1
            seen[agent].append(sequence)
            stored[agent] += receipt.stored_points
        assert len(plan.series_ids) == len(plan.times_ms) == len(plan.values) == sum(r.stored_points for r in plan.receipts)
        catalog.apply(plan)
    assert len(catalog.index) <= series_max
    for agent, sequences in seen.items():
        if not sequences:
            continue
        state = catalog.shipments[agent, "one"]
        assert state.last_sequence == max(sequences) == state.gaps + len(sequences)
        assert state.stored_points == stored[agent]


INCREASES = st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(0, 5)), max_size=6), max_size=12)


@given(arrivals=INCREASES, cuts=st.sets(st.integers(1, 11)))
def test_an_increase_counts_once_however_often_it_comes(arrivals: list[list[tuple[int, int, int]]], cuts: set[int]) -> None:
    """The model: per series, in order of arrival (in time within a request), what is later than all before is added."""
    catalog = Catalog()
    made = replace(layout(3), deltas=(0, 1))  # the third series is cumulative
    totals: dict[int, tuple[int, float]] = {}
    edges = [0, *sorted(c for c in cuts if c < len(arrivals)), len(arrivals)]
    stored: dict[int, list[float]] = {0: [], 1: [], 2: []}
    expected: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for low, high in itertools.pairwise(edges):
        group = [
            Batch(
                made, np.array([p[0] for p in points], np.int32), np.array([p[1] for p in points], np.int64),
                np.array([p[2] for p in points], np.float64),
            )
            for points in arrivals[low:high]
        ]  # fmt: skip
        plan = plan_commit(group, catalog.known(), limits=SeriesLimits(10, 10), now_unix_ms=BASE_MS)
        for points, receipt in zip(arrivals[low:high], plan.receipts, strict=True):
            taken = 0
            for series, time, value in sorted(points, key=lambda p: p[1]):
                last, total = totals.get(series, (0, 0.0))
                if series == 2 or time > last:
                    taken += 1
                    totals[series] = (time, value if series == 2 else total + value)
                    expected[series].append(totals[series][1])
            assert (receipt.stored_points, receipt.deltas_repeated) == (taken, len(points) - taken)
        catalog.apply(plan)
        for series_id, value in zip(plan.series_ids.tolist(), plan.values.tolist(), strict=True):
            stored[int(dict(catalog.index.labels(np.array([series_id], np.int32))[0])["i"])].append(value)
    assert {series: sorted(values) for series, values in stored.items()} == {
        series: sorted(values) for series, values in expected.items()
    }


LABEL_SETS = st.lists(
    st.dictionaries(st.sampled_from("xyz"), st.sampled_from(["", "a", "b", "ab", "a\nb"]), max_size=3), min_size=1, max_size=20
)
MATCHERS = st.lists(
    st.builds(
        Matcher,
        st.sampled_from(["x", "y", "z", "none"]),
        st.sampled_from(MatchOp),
        st.sampled_from(["", "a", "b", "a.*", ".+", ".*", "a|"]),
    ),
    max_size=4,
)


@given(sets=LABEL_SETS, matchers=MATCHERS, removed=st.sets(st.integers(0, 19)))
def test_index_selects_what_a_scan_would(sets: list[dict[str, str]], matchers: list[Matcher], removed: set[int]) -> None:
    index = SeriesIndex()
    distinct = list(dict.fromkeys(labels_of({**labels, "__name__": "m"}) for labels in sets))
    index.add(enumerate(distinct))
    gone = {i for i in removed if i < len(distinct)}
    index.remove(gone)

    def accepts(matcher: Matcher, value: str) -> bool:
        match matcher.op:
            case MatchOp.EQUAL:
                return value == matcher.value
            case MatchOp.NOT_EQUAL:
                return value != matcher.value
            case MatchOp.REGEX:
                return re.fullmatch(matcher.value, value, re.DOTALL) is not None
            case MatchOp.NOT_REGEX:
                return re.fullmatch(matcher.value, value, re.DOTALL) is None

    expected = [
        i
        for i, labels in enumerate(distinct)
        if i not in gone and all(accepts(m, dict(labels).get(m.name, "")) for m in matchers)
    ]
    assert index.select(matchers).tolist() == expected
    assert index.labels(np.array(expected, np.int32)) == [distinct[i] for i in expected]


@given(st.dictionaries(st.text(), st.text()))
def test_labels_survive_their_json_form(labels: dict[str, str]) -> None:
    canonical = labels_of(labels)
    try:
        "".join(name + value for name, value in canonical).encode()
    except UnicodeEncodeError:
        return  # protobuf lets no lone surrogate through
    assert labels_from_json(labels_to_json(canonical)) == canonical
