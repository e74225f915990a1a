"""Every expression of tests/golden/*.promql gives the answer written beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pgherd.promql.engine import evaluate_instant, evaluate_range
from pgherd.promql.values import Scalar, String, Vector
from pgherd.proto.errors import PgherdError
from support.memory_series import MemorySeries
from support.promql_script import Case, Labels, read_script

SCRIPTS = sorted((Path(__file__).parent.parent / "golden").glob("*.promql"))


def _cases() -> list[object]:
    found: list[object] = []
    for path in SCRIPTS:
        source, cases = read_script(path)
        found += [pytest.param(source, case, id=case.where) for case in cases]
    assert found
    return found


def _same(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return (math.isnan(found) and math.isnan(expected)) or math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-15)


def _answer(case: Case, source: MemorySeries) -> dict[Labels, list[float | None]] | float | str:
    if case.step_ms is None:
        match evaluate_instant(case.expr, case.start_ms, source):
            case Scalar(value=number):
                return number
            case String(value=text):
                return text
            case Vector(samples=samples):
                answer: dict[Labels, list[float | None]] = {frozenset(s.labels.items()): [s.value] for s in samples}
                assert len(answer) == len(samples), "elements with equal labels"
                return answer
            case other:
                raise AssertionError(f"unexpected {other}")
    steps = range(case.start_ms, case.end_ms + 1, case.step_ms)
    series: dict[Labels, list[float | None]] = {}
    for one in evaluate_range(case.expr, case.start_ms, case.end_ms, case.step_ms, source).series:
        values = dict(zip(one.times_ms.tolist(), one.values.tolist(), strict=True))
        assert frozenset(one.labels.items()) not in series, "series with equal labels"
        series[frozenset(one.labels.items())] = [values.get(step) for step in steps]
    return series


@pytest.mark.parametrize(("source", "case"), _cases())
def test_golden(source: MemorySeries, case: Case) -> None:
    if case.error is not None:
        with pytest.raises(PgherdError) as raised:
            _answer(case, source)
        assert raised.value.code == case.error
        return
    answer = _answer(case, source)
    if isinstance(answer, str):
        assert answer == case.string
    elif isinstance(answer, float):
        assert case.scalar is not None, answer
        assert _same(answer, case.scalar), answer
    else:
        assert case.scalar is None
        assert case.string is None
        assert answer.keys() == case.series.keys()
        for labels, expected in case.series.items():
            found = answer[labels]
            assert len(found) == len(expected), f"{found} for {expected}"
            assert all(map(_same, found, expected)), f"{found}, expected {expected}"
