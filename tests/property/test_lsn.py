"""LSN arithmetic holds for every position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.proto.lsn import Lsn, Timeline, segment_name, segment_start

POSITIONS = st.integers(min_value=0, max_value=(1 << 64) - 1)
SEGMENT_BYTES = st.sampled_from([1 << power for power in range(20, 31)])  # 1 MiB .. 1 GiB, as initdb allows


@given(POSITIONS)
def test_text_round_trip(position: int) -> None:
    assert Lsn.parse(str(Lsn(position))) == Lsn(position)


@given(POSITIONS, st.integers(min_value=1, max_value=0xFFFFFFFF), SEGMENT_BYTES)
def test_a_segment_holds_the_position_it_is_named_for(position: int, timeline: int, segment_bytes: int) -> None:
    parsed_timeline, start = segment_start(segment_name(Timeline(timeline), Lsn(position), segment_bytes), segment_bytes)
    assert parsed_timeline == Timeline(timeline)
    assert 0 <= Lsn(position) - start < segment_bytes


def test_known_names() -> None:
    """Checked against pg_walfile_name() of PostgreSQL 15."""
    assert segment_name(Timeline(1), Lsn.parse("0/1500028"), 1 << 24) == "000000010000000000000001"
    assert segment_name(Timeline(3), Lsn.parse("16/B374D848"), 1 << 24) == "0000000300000016000000B3"


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "G/0", "0/100000000", "-1/0", "0/0 "])
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="LSN"):
        Lsn.parse(text)
