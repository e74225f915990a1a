"""Rule files in Prometheus' format → groups. Every complaint names file and line, and is made while loading.

Accepted: `groups` of `name`, `interval`, `query_offset`, `limit`, `labels`, `rules`; a rule of `alert` or `record`,
`expr`, `labels`, and for alerts `for`, `keep_firing_for`, `annotations`.
Source: https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules/ and recording_rules/
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

import yaml

from pgherd.alerts.model import ALERT_NAME_LABEL, Group, RecordingRule, Rule
from pgherd.alerts.template import Template, compile_template
from pgherd.proto.errors import ConfigError, PgherdError
from pgherd.proto.selectors import NAME_LABEL

# Parses an expression or raises a PgherdError: the evaluator's own parser, so that what loads also runs.
CheckExpression = Callable[[str], object]

_FILE_BYTES_MAX = 4 * 1024 * 1024
_GROUP_KEYS = ("name", "interval", "query_offset", "limit", "labels", "rules")
_RULE_KEYS = ("alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations")
_ALERTS_ONLY = ("for", "keep_firing_for", "annotations")
_METRIC_NAME_RE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_MERGE_TAG = "tag:yaml.org,2002:merge"
_MERGER = yaml.constructor.SafeConstructor()
_LABEL_NAME_RE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_DURATION_RE = re.compile("".join(rf"(?:([0-9]+){unit})?" for unit in ("y", "w", "d", "h", "m", "s", "ms")))
_DURATION_UNITS_MS = (365 * 86_400_000, 7 * 86_400_000, 86_400_000, 3_600_000, 60_000, 1_000, 1)


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of Prometheus' "1h30m", "15s", "250ms", "0". Raises ValueError."""
    match = _DURATION_RE.fullmatch(text if text != "0" else "0s")
    if match is None or not any(match.groups()):
        raise ValueError(f"not a duration: {text!r}; write it like 30s, 5m or 1h30m")
    return sum(int(count or 0) * unit for count, unit in zip(match.groups(), _DURATION_UNITS_MS, strict=True)) * 1_000_000


def load_rules(
    files: Sequence[Path], *, builtin: bool, interval_s: float, check_expression: CheckExpression
) -> tuple[Group, ...]:
    """The built-in pack, if wanted, and the groups of `files`, in this order.

    `interval_s` is for groups that state none. Raises ConfigError rules.invalid | config.unreadable.
    """
    interval_ns = int(interval_s * 1e9)
    groups: list[Group] = []
    if builtin:
        for name, text in builtin_files().items():
            groups += parse_rules(text, name, interval_ns=interval_ns, check_expression=check_expression)
    for file in files:
        groups += parse_rules(read_text(file), str(file), interval_ns=interval_ns, check_expression=check_expression)
    _refuse_repeated(groups)
    return tuple(groups)


def builtin_files() -> dict[str, str]:
    """The shipped rule files, name → text, as they can also be given to Prometheus."""
    directory = resources.files("pgherd.alerts") / "rules"
    files = sorted((entry for entry in directory.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {f"builtin/{entry.name}": entry.read_text(encoding="utf-8") for entry in files}


def parse_rules(
    text: str, file: str, *, interval_ns: int, check_expression: CheckExpression, repeats: bool = False
) -> tuple[Group, ...]:
    """The groups of one rule file; `file` is the name that errors show.

    `repeats` allows rules of one name with equal labels, as Prometheus does; the collector can't tell their alerts apart.
    Raises ConfigError rules.invalid.
    """
    top = _File(file, check_expression, interval_ns)
    root = top.compose(text)
    if root is None:
        return ()
    members = top.mapping(root, ("groups",), "the file")
    groups = tuple(top.group(node) for node in top.sequence(members["groups"], "groups")) if "groups" in members else ()
    names: dict[str, Group] = {}
    for group in groups:
        if group.name in names:
            raise _invalid(file, f"group {group.name!r} appears twice in this file")
        names[group.name] = group
    if not repeats:
        _refuse_repeated(groups)
    return groups


def read_text(file: Path) -> str:
    """A rule or test file's content. Raises ConfigError config.unreadable | rules.invalid."""
    try:
        content = file.read_bytes()
        if len(content) > _FILE_BYTES_MAX:
            raise _invalid(str(file), f"larger than {_FILE_BYTES_MAX >> 20} MiB")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(
            "config.unreadable",
            f"can't read the rule file {file}: {error.strerror}",
            hint="check the path (alerts.rule_files) and the file's owner",
            path=str(file),
        ) from error
    except UnicodeDecodeError as error:
        raise _invalid(str(file), "not UTF-8") from error


def _refuse_repeated(groups: Iterable[Group]) -> None:
    """Two rules with one id would share, and overwrite, each other's state."""
    seen: dict[str, Rule | RecordingRule] = {}
    for rule in (rule for group in groups for rule in group.rules):
        first = seen.setdefault(rule.id, rule)
        if first is not rule:
            raise _invalid(
                rule.origin,
                f"{_called(rule)} of group {rule.group!r} with these labels is already defined at {first.origin}",
                hint="give one of them another name or another label, such as severity",
            )


def _called(rule: Rule | RecordingRule) -> str:
    return f"alert {rule.alert!r}" if isinstance(rule, Rule) else f"record {rule.record!r}"


def _invalid(
    where: str, problem: str, *, hint: str = "mend that line; `pgherd collector config check` tries again"
) -> ConfigError:
    return ConfigError("rules.invalid", f"{where}: {problem}", hint=hint, where=where)


class YamlReader:
    """Reads the nodes of one file; knows what to call a line."""

    def __init__(self, name: str) -> None:
        self._name = name

    def compose(self, text: str) -> yaml.Node | None:
        """The document's root; None for an empty one. Raises ConfigError rules.invalid."""
        try:
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark is not None else 1
            raise _invalid(f"{self._name}:{line}", f"not YAML: {getattr(error, 'problem', None) or error}") from error

    def invalid(self, node: yaml.Node | None, problem: str) -> ConfigError:
        """The complaint about a node, or about the file."""
        return _invalid(self._name if node is None else self.where(node), problem)

    def is_null(self, node: yaml.Node) -> bool:
        return node.tag == "tag:yaml.org,2002:null"

    def where(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"

    def mapping(self, node: yaml.Node, keys: Sequence[str] | None, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise _invalid(self.where(node), f"{what} must be a mapping")
        own: set[str] = set()
        for key_node, _value in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self.text(key_node, "a key")
            if key in own:
                raise _invalid(self.where(key_node), f"{key!r} appears twice")
            own.add(key)
            if keys is not None and key not in keys:
                close = difflib.get_close_matches(key, keys, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(keys)}"
                raise _invalid(self.where(key_node), f"unknown key {key!r} in {what}", hint=hint)
        try:
            _MERGER.flatten_mapping(node)  # `<<: *other`; what stands here itself wins
        except yaml.YAMLError as error:
            raise _invalid(self.where(node), "<< must name a mapping") from error
        # A key of the format without a value is as good as not there, as in Prometheus.
        return {str(key.value): value for key, value in node.value if keys is None or not self.is_null(value)}

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise _invalid(self.where(node), f"{what} must be a list")
        return list(node.value)

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
            raise _invalid(self.where(node), f"{what} must be text")
        return str(node.value)

    def required(self, members: dict[str, yaml.Node], key: str, node: yaml.Node, what: str) -> str:
        if key not in members or not (text := self.text(members[key], key)).strip():
            raise _invalid(self.where(node), f"{what} has no {key}")
        return text

    def duration_ns(self, members: dict[str, yaml.Node], key: str, default_ns: int) -> int:
        if key not in members:
            return default_ns
        try:
            return parse_duration_ns(self.text(members[key], key))
        except ValueError as error:
            raise _invalid(self.where(members[key]), f"{key}: {error}") from error

    def texts(self, node: yaml.Node | None, what: str) -> dict[str, yaml.Node]:
        """Names and text nodes of labels or annotations."""
        if node is None:
            return {}
        found: dict[str, yaml.Node] = {}
        for name, value in self.mapping(node, None, what).items():
            if _LABEL_NAME_RE.fullmatch(name) is None or name in (
                NAME_LABEL,
                *((ALERT_NAME_LABEL,) if what == "labels" else ()),
            ):
                raise _invalid(self.where(value), f"{name!r} can't be a name in {what}")
            found[name] = value if not self.is_null(value) else yaml.ScalarNode("tag:yaml.org,2002:str", "", value.start_mark)
            self.text(found[name], name)
        return found


class _File(YamlReader):
    """Reads a rule file."""

    def __init__(self, name: str, check_expression: CheckExpression, interval_ns: int) -> None:
        super().__init__(name)
        self._check_expression = check_expression
        self._interval_ns = interval_ns

    def group(self, node: yaml.Node) -> Group:
        members = self.mapping(node, _GROUP_KEYS, "a group")
        name = self.required(members, "name", node, "a group")
        interval_ns = self.duration_ns(members, "interval", 0) or self._interval_ns  # 0 is the general one, as in Prometheus
        limit_text = self.text(members["limit"], "limit") if "limit" in members else "0"
        if not limit_text.isdecimal():
            raise _invalid(self.where(members["limit"]), f"limit must be a whole number, not {limit_text!r}")
        labels = self.texts(members.get("labels"), "labels")
        rules = self.sequence(members["rules"], "rules") if "rules" in members else []
        return Group(
            name=name,
            interval_ns=interval_ns,
            limit=int(limit_text),
            query_offset_ns=self.duration_ns(members, "query_offset", 0),
            source=self._name,
            rules=tuple(self.rule(rule, name, labels) for rule in rules),
        )

    def rule(self, node: yaml.Node, group: str, group_labels: dict[str, yaml.Node]) -> Rule | RecordingRule:
        members = self.mapping(node, _RULE_KEYS, "a rule")
        if ("alert" in members) == ("record" in members):
            raise _invalid(self.where(node), "a rule has either alert or record")
        kind = "alert" if "alert" in members else "record"
        name = self.required(members, kind, node, "a rule")
        expr = self.required(members, "expr", node, f"{kind} {name}").strip()
        try:
            self._check_expression(expr)
        except PgherdError as error:
            raise _invalid(self.where(members["expr"]), f"{kind} {name}: {error.message}", hint=error.hint) from error
        labels = {**group_labels, **self.texts(members.get("labels"), "labels")}
        if kind == "record":
            return self.recording_rule(node, members, group, name, expr, labels)
        return Rule(
            group=group,
            alert=name,
            expr=expr,
            for_ns=self.duration_ns(members, "for", 0),
            keep_firing_for_ns=self.duration_ns(members, "keep_firing_for", 0),
            labels=self.templates(labels),
            annotations=self.templates(self.texts(members.get("annotations"), "annotations")),
            origin=self.where(node),
        )

    def recording_rule(
        self, node: yaml.Node, members: dict[str, yaml.Node], group: str, name: str, expr: str, labels: dict[str, yaml.Node]
    ) -> RecordingRule:
        for key in _ALERTS_ONLY:
            if key in members:
                raise _invalid(self.where(members[key]), f"record {name}: {key} is for alerts")
        if _METRIC_NAME_RE.fullmatch(name) is None:
            raise _invalid(self.where(members["record"]), f"{name!r} can't be a metric's name")
        texts = {label: self.text(value, label) for label, value in labels.items()}
        return RecordingRule(group, name, expr, texts, self.where(node))

    def templates(self, texts: dict[str, yaml.Node]) -> dict[str, Template]:
        return {name: compile_template(self.text(value, name), where=self.where(value)) for name, value in texts.items()}
