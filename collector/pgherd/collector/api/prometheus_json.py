"""Prometheus' JSON for query results, byte for byte what its clients expect.

Values are strings in Go's shortest form, times are seconds with at most three decimals. Encoding dominates large range
queries, so matrices are formatted column-wise by Arrow (1 M samples in some 0.4 s; a loop takes 1.5 s).
Source: Prometheus documentation, "HTTP API" (expression query result formats); strconv.FormatFloat of Go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgherd.promql.values import Matrix, Scalar, Series, String, Value, Vector

# Samples formatted at once; far from Arrow's 2 GiB limit on one array of strings.
_BATCH_SAMPLES = 1_000_000
# Arrow writes the same digits as Go, but in exponent form from here on.
_ARROW_PLAIN_BELOW = 1e10
_GO_PLAIN_FROM = 1e-6
_GO_PLAIN_BELOW = 1e21
# Above, Go prints the shortest digits that identify the float, not all digits of the integer.
_INTEGER_BELOW = 2.0**53


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dump(document: object) -> bytes:
    """Compact JSON in UTF-8; characters that UTF-8 can't hold become question marks."""
    return _ENCODER.encode(document).encode("utf-8", "replace")


def format_value(value: float) -> str:
    """A float as Prometheus prints it: "1", "0.1", "1e+21", "1e-07", "+Inf", "NaN"."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    digits = repr(value)
    if "e" not in digits and (value == 0 or abs(value) >= _GO_PLAIN_FROM):
        return digits.removesuffix(".0")
    mantissa, _, exponent = digits.partition("e")
    if not exponent or _GO_PLAIN_FROM <= abs(value) < _GO_PLAIN_BELOW:
        return _plain(mantissa, int(exponent or 0))
    # Go and Python agree on a sign and at least two digits.
    return f"{mantissa.removesuffix('.0')}e{exponent}"


def _plain(mantissa: str, exponent: int) -> str:
    """Shift the decimal point of `mantissa` by `exponent` places."""
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    fraction = fraction if fraction != "0" else ""
    digits, point = whole + fraction, len(whole) + exponent
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    if point >= len(digits):
        return f"{sign}{digits}{'0' * (point - len(digits))}"
    return f"{sign}{digits[:point]}.{digits[point:]}"


def format_time(time_ms: int) -> str:
    """Seconds since the epoch as a JSON number."""
    seconds, milliseconds = divmod(abs(time_ms), 1000)
    sign = "-" if time_ms < 0 else ""
    return f"{sign}{seconds}.{milliseconds:03d}" if milliseconds else f"{sign}{seconds}"


def encode_result(value: Value) -> bytes:
    """The `data` member of a query's answer."""
    match value:
        case Scalar():
            return f'{{"resultType":"scalar","result":[{format_time(value.at_ms)},"{format_value(value.value)}"]}}'.encode()
        case String():
            return b'{"resultType":"string","result":[' + format_time(value.at_ms).encode() + b"," + dump(value.value) + b"]}"
        case Vector():
            return b'{"resultType":"vector","result":[' + b",".join(_vector(value)) + b"]}"
        case Matrix():
            return b'{"resultType":"matrix","result":[' + b",".join(_matrix(value.series)) + b"]}"


def _vector(vector: Vector) -> Iterator[bytes]:
    at = format_time(vector.at_ms)
    for sample in vector.samples:
        yield b'{"metric":' + _labels(sample.labels) + f',"value":[{at},"{format_value(sample.value)}"]}}'.encode()


def _matrix(series: Sequence[Series]) -> Iterator[bytes]:
    start = 0
    while start < len(series):
        end, samples = start, 0
        while end < len(series) and (end == start or samples + len(series[end].times_ms) <= _BATCH_SAMPLES):
            samples += len(series[end].times_ms)
            end += 1
        batch = series[start:end]
        for one, points in zip(batch, _points(batch), strict=True):
            yield b'{"metric":' + _labels(one.labels) + b',"values":[' + points + b"]}"
        start = end


def _labels(labels: Mapping[str, str]) -> bytes:
    return dump(dict(sorted(labels.items())))


def _points(batch: Sequence[Series]) -> list[bytes]:
    """Each series' samples as `[time,"value"],…`."""
    # Series without gaps share one array of steps: format it once.
    formatted: dict[int, pa.Array] = {}
    for series in batch:
        if id(series.times_ms) not in formatted:
            formatted[id(series.times_ms)] = _format_times(series.times_ms)
    times = pa.concat_arrays([formatted[id(series.times_ms)] for series in batch])
    values = _format_values(np.concatenate([series.values for series in batch]))
    pairs = pc.binary_join_element_wise("[", times, ',"', values, '"]', "")
    ends = np.cumsum([0, *(len(series.times_ms) for series in batch)])
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pairs), ",")
    return [points.encode() for points in joined.to_pylist()]


def _format_times(times_ms: NDArray[np.int64]) -> pa.Array:
    magnitude = np.abs(times_ms)
    seconds = pc.cast(pa.array(magnitude // 1000), pa.string())
    milliseconds = magnitude % 1000
    if milliseconds.any():
        fraction = pc.binary_join_element_wise(".", pc.utf8_lpad(pc.cast(pa.array(milliseconds), pa.string()), 3, "0"), "")
        seconds = pc.binary_join_element_wise(seconds, pc.if_else(pa.array(milliseconds != 0), fraction, ""), "")
    if (times_ms < 0).any():
        seconds = pc.binary_join_element_wise(pc.if_else(pa.array(times_ms < 0), "-", ""), seconds, "")
    return seconds


def _format_values(values: NDArray[np.float64]) -> pa.Array:
    """`format_value` of every element: Arrow for what it writes like Go, the rest one by one."""
    with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
        magnitude = np.abs(values)
        whole = (magnitude < _INTEGER_BELOW) & (values == np.trunc(values)) & ~((values == 0) & np.signbit(values))
    plain = (magnitude >= _GO_PLAIN_FROM) & (magnitude < _ARROW_PLAIN_BELOW)
    # A copy where the odd ones are 0, since casting Inf, NaN or 1e300 to an integer isn't defined.
    integers = pc.cast(pa.array(np.where(whole, values, 0.0).astype(np.int64)), pa.string())
    if whole.all():
        return integers
    formatted = pc.if_else(pa.array(whole), integers, pc.cast(pa.array(values), pa.string()))
    nan = np.isnan(values)
    if nan.any():
        formatted = pc.if_else(pa.array(nan), "NaN", formatted)
    odd = ~(whole | plain | nan)
    if odd.any():
        replacements = pa.array([format_value(value) for value in values[odd].tolist()], pa.string())
        formatted = pc.replace_with_mask(formatted, pa.array(odd), replacements)
    return formatted
