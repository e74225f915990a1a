"""Matchers over alert labels, in Alertmanager's notation: `severity="critical"`, `node=~"db.*"`, `team!=""`. Pure.

Source: Alertmanager documentation, configuration, <matcher>.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from pgherd.proto.errors import ConfigError
from pgherd.proto.selectors import Matcher, MatchOp

# Whether the whole of a text matches an RE2 pattern. Raises ConfigError for a bad pattern.
FullMatch = Callable[[str, str], bool]

MATCHERS_MAX = 32
_TEXT_MAX = 4096
_MATCHER_RE = re.compile(
    r"""\s*(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)\s*(?P<op>=~|!~|!=|=)\s*(?P<value>"(?:[^"\\]|\\.)*"|(?![=~])[^\s"{},]*)\s*""",
    re.DOTALL,
)
_ESCAPES = {"n": "\n", '"': '"', "\\": "\\"}


def parse_matcher(text: str) -> Matcher:
    """One matcher; the value may stand without quotes. Raises ConfigError usage.invalid."""
    match = _MATCHER_RE.fullmatch(text)
    if match is None or len(text) > _TEXT_MAX:
        raise ConfigError(
            "usage.invalid", f"{text[:200]!r} isn't a matcher", hint='write it like severity="critical" or node=~"db.*"'
        )
    value = match["value"]
    if value.startswith('"'):
        value = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[0]), value[1:-1])
    return Matcher(match["name"], MatchOp(match["op"]), value)


def parse_matchers(texts: Sequence[str], full_match: FullMatch) -> tuple[Matcher, ...]:
    """All of them, their patterns tried. Raises ConfigError usage.invalid | promql.parse."""
    if len(texts) > MATCHERS_MAX:
        raise ConfigError("usage.invalid", f"more than {MATCHERS_MAX} matchers")
    matchers = tuple(parse_matcher(text) for text in texts)
    for matcher in matchers:
        if matcher.op in (MatchOp.REGEX, MatchOp.NOT_REGEX):
            full_match(matcher.value, "")
    return matchers


def matches(matchers: Iterable[Matcher], labels: Mapping[str, str], full_match: FullMatch) -> bool:
    """Whether all hold; a label that isn't there reads as empty."""
    return all(_holds(matcher, labels.get(matcher.name, ""), full_match) for matcher in matchers)


def _holds(matcher: Matcher, value: str, full_match: FullMatch) -> bool:
    match matcher.op:
        case MatchOp.EQUAL:
            return value == matcher.value
        case MatchOp.NOT_EQUAL:
            return value != matcher.value
        case MatchOp.REGEX:
            return full_match(matcher.value, value)
        case MatchOp.NOT_REGEX:
            return not full_match(matcher.value, value)
