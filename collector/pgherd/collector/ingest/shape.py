"""The fast path: a sender repeats its layout every cycle, so only times and values need decoding.

A template is the request's bytes with every time, start time and value (eight bytes each, fixed64 on the wire) set
to zero. A request of the same length whose bytes outside these holes are equal has the same tags and lengths, hence
the same structure, labels, flags and kinds: its decoding is the template's, with other numbers in the holes.
Measured: 28 M points/s against 0.3 M of the slow path.

Never broken: the answer is equal to `otlp.decode` of the same bytes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pgherd.collector.ingest import otlp
from pgherd.collector.ingest.admit import AdmitLimits, Peer
from pgherd.collector.ingest.otlp import Decoded
from pgherd.proto.samples import STALE_NAN_BITS

_Key = tuple[str, str, int]
_ABSENT = -1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_TEMPLATES_PER_KEY = 4
_SEEN_MAX = 65_536


@dataclass(frozen=True, slots=True)
class PointHoles:
    """Where one number data point's eight-byte fields begin; -1 when it has none."""

    start: int
    time: int
    as_double: int
    as_int: int


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A layout that was seen: `masked` bytes, the holes, and what they decode to."""

    decoded: Decoded
    masked: bytes
    holes: NDArray[np.int32]  # of all points, rejected ones too: their numbers don't matter
    times: NDArray[np.int32]  # of accepted points, into the bytes; -1: always 0
    values: NDArray[np.int32]  # -1: always the stale marker
    integers: NDArray[np.intp]  # accepted points whose value is an integer

    @property
    def size_bytes(self) -> int:
        arrays = (self.holes, self.times, self.values, self.integers, self.decoded.series, self.decoded.ordinals)
        return len(self.masked) + sum(array.nbytes for array in arrays) + self.decoded.layout.size_bytes

    def read(self, body: bytes) -> Decoded | None:
        """`body` decoded, or None when it isn't of this shape."""
        scratch = bytearray(body)
        words = _words(scratch)
        times, bits = words[self.times], words[self.values]
        words[self.holes] = 0
        if scratch != self.masked:
            return None
        times[self.times == _ABSENT] = 0
        bits[self.values == _ABSENT] = STALE_NAN_BITS
        values = bits.view(np.float64)
        values[self.integers] = bits.view(np.int64)[self.integers].astype(np.float64)
        return replace(self.decoded, times_ns=times, values=values)


def template_of(body: bytes, decoded: Decoded) -> Template | None:
    """The template of a decoded request; None when its wire form is unusual."""
    points = scan(body)
    if not points or len(body) < 8:
        return None
    table = np.array([(p.start, p.time, p.as_double, p.as_int) for p in points], np.int32)
    holes = table[table != _ABSENT]
    accepted = table[decoded.ordinals]
    is_stale = decoded.values.view(np.uint64) == STALE_NAN_BITS
    # A value equal to the marker by chance, without the flag, would freeze: such a request gets no template.
    values = np.where(accepted[:, 2] != _ABSENT, accepted[:, 2], accepted[:, 3])
    if np.any(is_stale & (values != _ABSENT)):
        return None
    scratch = bytearray(body)
    _words(scratch)[holes] = 0
    integers = np.flatnonzero(accepted[:, 3] != _ABSENT)
    return Template(decoded, bytes(scratch), holes, accepted[:, 1].copy(), values, integers)


def _words(buffer: bytearray) -> NDArray[np.uint64]:
    """Every eight bytes of `buffer` as little-endian integers: word i begins at byte i."""
    return np.ndarray((max(len(buffer) - 7, 0),), np.dtype("<u8"), buffer, 0, (1,))


class ShapeCache:
    """Templates by sender and length, least recently used out first, bounded in bytes. Safe from any thread."""

    def __init__(self, limits: AdmitLimits, bytes_max: int = 64 * 1024 * 1024) -> None:
        self._limits = limits
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._templates: OrderedDict[_Key, tuple[Template, ...]] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0

    def decode(self, body: bytes, peer: Peer) -> Decoded:
        """As `otlp.decode`, faster when this peer sent this layout before."""
        key = (peer.kind, peer.id, len(body))
        with self._lock:
            candidates = self._templates.get(key, ())
            if candidates:
                self._templates.move_to_end(key)
        for candidate in candidates:
            if (known := candidate.read(body)) is not None:
                with self._lock:
                    self.hits += 1
                return known
        decoded = otlp.decode(body, peer.kind, self._limits)
        if self._is_second_sight(key) and (template := template_of(body, decoded)) is not None:
            self._remember(key, template)
        return decoded

    def _is_second_sight(self, key: _Key) -> bool:
        """A length that never comes back isn't worth a scan."""
        with self._lock:
            self.misses += 1
            seen = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > _SEEN_MAX:
                self._seen.popitem(last=False)
        return seen

    def _remember(self, key: _Key, template: Template) -> None:
        with self._lock:
            before = self._templates.get(key, ())
            after = (template, *before)[:_TEMPLATES_PER_KEY]
            self.size_bytes += sum(t.size_bytes for t in after) - sum(t.size_bytes for t in before)
            self._templates[key] = after
            self._templates.move_to_end(key)
            while self.size_bytes > self._bytes_max:
                _, gone = self._templates.popitem(last=False)
                self.size_bytes -= sum(t.size_bytes for t in gone)


# --- the wire -----------------------------------------------------------------------------------
# Field numbers: opentelemetry/proto/metrics/v1/metrics.proto. Only bytes that protobuf has parsed come here.


_FIRST, _SECOND = frozenset({1}), frozenset({2})
_DATA = frozenset({5, 7, 9, 10, 11})


class _UnusualError(Exception):
    """The wire form is legal, but its holes can't be told with certainty."""


def scan(body: bytes) -> list[PointHoles] | None:
    """The holes of every number data point in wire order; None when the wire form is unusual."""
    points: list[PointHoles] = []
    try:
        for _, start, end in _messages(body, 0, len(body), _FIRST):  # resource_metrics
            for _, scope_start, scope_end in _messages(body, start, end, _SECOND):  # scope_metrics
                for _, metric_start, metric_end in _messages(body, scope_start, scope_end, _SECOND):  # metrics
                    _scan_metric(body, metric_start, metric_end, points)
    except (_UnusualError, IndexError):
        return None
    return points


def _scan_metric(body: bytes, start: int, end: int, points: list[PointHoles]) -> None:
    data = _messages(body, start, end, _DATA)  # gauge, sum, histogram, exponential_histogram, summary
    if len(data) > 1:
        raise _UnusualError  # a oneof set twice: merged or replaced
    for number, data_start, data_end in data:
        if number not in (5, 7):
            raise _UnusualError  # never equal twice
        points.extend(_scan_point(body, low, high) for _, low, high in _messages(body, data_start, data_end, _FIRST))


def _scan_point(body: bytes, at: int, end: int) -> PointHoles:
    found = {2: _ABSENT, 3: _ABSENT, 4: _ABSENT, 6: _ABSENT}
    while at < end:
        tag = body[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = _varint(body, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _FIXED64:
            if found.get(number) != _ABSENT:
                raise _UnusualError  # twice, or unknown
            found[number] = at
            at += 8
        elif number == 5:
            raise _UnusualError  # exemplars differ each time
        else:
            at = _skip(body, at, wire_type)
    if found[4] != _ABSENT and found[6] != _ABSENT:
        raise _UnusualError
    return PointHoles(found[2], found[3], found[4], found[6])


def _messages(body: bytes, at: int, end: int, wanted: frozenset[int]) -> list[tuple[int, int, int]]:
    """(field number, start, end) of the wanted length-delimited fields between two places, in wire order."""
    found = []
    while at < end:
        tag, at = _varint(body, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _LENGTH:
            size, at = _varint(body, at)
            if number in wanted:
                found.append((number, at, at + size))
            at += size
        else:
            at = _skip(body, at, wire_type)
    if at != end:
        raise _UnusualError
    return found


def _skip(body: bytes, at: int, wire_type: int) -> int:
    if wire_type == _VARINT:
        return _varint(body, at)[1]
    if wire_type == _LENGTH:
        size, at = _varint(body, at)
        return at + size
    if wire_type == _FIXED64:
        return at + 8
    if wire_type == _FIXED32:
        return at + 4
    raise _UnusualError  # groups


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _UnusualError
