"""Parts of a UTC date and time, from seconds since 1970. Source: Prometheus documentation, "day_of_month()" and relatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pgherd.promql.grid import Floats, Integers

_DAY_S = 86_400
# From the first day of the year 0 of an era of 400 years, beginning with March, to 1970-01-01.
_DAYS_TO_EPOCH = 719_468
_DAYS_OF_ERA = 146_097
# What Go makes of a float that isn't an int64; dates that far away mean nothing, but the same nothing as in Prometheus.
_NO_INT64 = -(2**63)
_GO_EPOCH_S = 9_223_371_966_579_724_800 + 62_135_596_800  # Go counts seconds from the year -292277022399, modulo 2^64


def _days_and_seconds(values: Floats) -> tuple[Integers, Integers]:
    """Days since 1970 and the second of the day, wrapped as Go's calendar wraps them."""
    fits = np.abs(values) < 2.0**63
    seconds = np.where(fits, np.where(fits, values, 0.0).astype(np.int64), _NO_INT64)
    counted = seconds.astype(np.uint64) + np.uint64(_GO_EPOCH_S)
    days = (counted // np.uint64(_DAY_S)).astype(np.int64) - _GO_EPOCH_S // _DAY_S
    return days, (counted % np.uint64(_DAY_S)).astype(np.int64)


def _civil(days: Integers) -> tuple[Integers, Integers, Integers]:
    """Year, month and day of the month of days since 1970 (the proleptic Gregorian calendar)."""
    shifted = days + _DAYS_TO_EPOCH
    era = shifted // _DAYS_OF_ERA
    day_of_era = shifted - era * _DAYS_OF_ERA
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month_from_march = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month_from_march + 2) // 5 + 1
    month = np.where(month_from_march < 10, month_from_march + 3, month_from_march - 9)
    return year_of_era + era * 400 + (month <= 2), month, day


def _is_leap(year: Integers) -> Integers:
    leap: Integers = ((year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))).astype(np.int64)
    return leap


def _days_in_month(year: Integers, month: Integers) -> Integers:
    return np.where(month == 2, 28 + _is_leap(year), 30 + (month + month // 8) % 2)


def _day_of_year(year: Integers, month: Integers, day: Integers) -> Integers:
    # Days before a month of a year whose February has 30, less what February is short of.
    return (275 * month) // 9 - np.where(month > 2, 2 - _is_leap(year), 0) + day - 30


def _of_date(part: Callable[[Integers, Integers, Integers], Integers]) -> Callable[[Floats], Floats]:
    return lambda values: part(*_civil(_days_and_seconds(values)[0])).astype(np.float64)


def _of_time(part: Callable[[Integers, Integers], Integers]) -> Callable[[Floats], Floats]:
    return lambda values: part(*_days_and_seconds(values)).astype(np.float64)


DATE_FUNCTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "minute": _of_time(lambda _days, seconds: seconds // 60 % 60),
    "hour": _of_time(lambda _days, seconds: seconds // 3600),
    "day_of_week": _of_time(lambda days, _seconds: (days + 4) % 7),  # 1970 began on a Thursday; Sunday is 0
    "day_of_month": _of_date(lambda _year, _month, day: day),
    "day_of_year": _of_date(_day_of_year),
    "days_in_month": _of_date(lambda year, month, _day: _days_in_month(year, month)),
    "month": _of_date(lambda _year, month, _day: month),
    "year": _of_date(lambda year, _month, _day: year),
}
