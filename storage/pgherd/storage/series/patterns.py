"""PromQL's regular expressions over lists of values, in time linear in the input.

Prometheus' are RE2; Python's `re` backtracks, and one `(a+)+$` from a dashboard would stop the collector.
Arrow carries RE2 and matches a column at a time. Source: Prometheus docs, "Time series selectors": fully
anchored; the dot matches newlines (prometheus/model/labels/regexp.go).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgherd.proto.errors import ConfigError

PATTERN_CHARS_MAX = 16_384


def full_matches(pattern: str, values: Sequence[str]) -> NDArray[np.bool_]:
    """Which of `values` the whole of `pattern` matches. Raises ConfigError promql.parse."""
    if len(pattern) > PATTERN_CHARS_MAX:
        raise ConfigError("promql.parse", f"regular expression longer than {PATTERN_CHARS_MAX} characters", chars=len(pattern))
    try:
        # Alone first: "a)|(b" must not become valid by our parentheses.
        pc.match_substring_regex(pa.array([""], pa.string()), pattern)
        matched = pc.match_substring_regex(pa.array(values, pa.string()), f"^(?s:{pattern})$")
    except pa.ArrowInvalid as error:
        raise ConfigError("promql.parse", f"{error}", hint="PromQL takes RE2 syntax", pattern=pattern) from error
    result: NDArray[np.bool_] = matched.to_numpy(zero_copy_only=False).astype(np.bool_)
    return result
