"""Configuration in layers: TOML < environment < flags, validated as a whole, with the origin of each value.

A configuration is a tree of frozen standard dataclasses that its package owns; fields are annotated
`Duration` ("30s", "15m") and `Size` ("2GiB") where they mean that. Validation (pydantic) runs in the
short-lived process that reads the files; a resident process gets the outcome through `to_plain` /
`from_plain`, without paying pydantic's memory.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pgherd.proto.errors import ConfigError

T = TypeVar("T")

_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SIZE_UNITS_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_QUANTITY_RE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def parse_duration_s(text: str) -> float:
    """Seconds of "250ms", "30s", "15m", "24h", "7d", "1h30m". Raises ValueError."""
    position, total_s = 0, 0.0
    stripped = text.strip()
    for match in _QUANTITY_RE.finditer(stripped):
        if match.start() != position or match[2] not in _DURATION_UNITS_S:
            break
        total_s += float(match[1]) * _DURATION_UNITS_S[match[2]]
        position = match.end()
    if not stripped or position != len(stripped):
        raise ValueError(f"not a duration: {text!r}; write it like 30s, 15m or 1h30m")
    return total_s


def parse_size_bytes(text: str) -> int:
    """Bytes of "512B", "64MiB", "2GiB". Raises ValueError."""
    match = _QUANTITY_RE.fullmatch(text.strip())
    if match is None or match[2] not in _SIZE_UNITS_BYTES:
        raise ValueError(f"not a size: {text!r}; write it like 64MiB or 2GiB")
    return int(float(match[1]) * _SIZE_UNITS_BYTES[match[2]])


class _Quantity:
    """Teaches pydantic to read a quantity from text; pydantic itself is imported only when validating."""

    def __init__(self, parse: typing.Callable[[str], float]) -> None:
        self._parse = parse

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def before(value: object) -> object:
            if isinstance(value, str):
                return self._parse(value)
            if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
                return value
            raise ValueError('write it as text with a unit, like "30s" or "64MiB"')

        return core_schema.no_info_before_validator_function(before, handler(source))


Duration = Annotated[float, _Quantity(parse_duration_s)]
Size = Annotated[int, _Quantity(parse_size_bytes)]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """A validated configuration and, per dotted key that was set, where its value came from."""

    value: T
    origins: Mapping[str, str]

    def show(self) -> list[tuple[str, object, str]]:
        """Every leaf as (dotted key, value, origin); `default` where nobody set it."""
        return [(key, value, self.origins.get(key, "default")) for key, value in _leaves(self.value)]


def load(
    schema: type[T],
    *,
    file: Path | None,
    environment_prefix: str,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Loaded[T]:
    """Read, merge and validate all layers. `flags` maps dotted keys to values.

    `PGHERD_AGENT__SPOOL__SIZE_MAX=1GiB` (prefix `PGHERD_AGENT__`) sets `spool.size_max`. Relative paths
    are taken from the file's directory. Raises ConfigError config.unreadable | config.invalid naming the
    key, its origin and, for a typo, the nearest real key.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        _merge(tree, origins, _read_toml(file), str(file))
    for name, text in sorted((environment if environment is not None else os.environ).items()):
        if name.startswith(environment_prefix):
            path = name.removeprefix(environment_prefix).lower().split("__")
            _merge(tree, origins, _nest(path, _environment_value(text)), f"env {name}")
    for key, value in (flags or {}).items():
        if value is not None:
            _merge(tree, origins, _nest(key.split("."), value), f"flag {key}")
    return Loaded(_validate(schema, tree, origins, (file.parent if file else Path.cwd()).absolute()), origins)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "config.unreadable", f"can't read {file}: {error.strerror}", hint="state the file with --config", path=str(file)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config.unreadable", f"{file} isn't TOML: {error}", hint="mend that line", path=str(file)) from error


def _environment_value(text: str) -> object:
    """Lists, tables, numbers and booleans in TOML's own spelling; anything else is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nest(path: Sequence[str], value: object) -> dict[str, Any]:
    tree: Any = value
    for part in reversed(path):
        tree = {part: tree}
    return typing.cast(dict[str, Any], tree)


def _merge(tree: dict[str, Any], origins: dict[str, str], layer: Mapping[str, Any], origin: str, prefix: str = "") -> None:
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            below = tree.setdefault(key, {})
            if not isinstance(below, dict):
                below = tree[key] = {}
            _merge(below, origins, value, origin, f"{dotted}.")
            continue
        tree[key] = value
        origins[dotted] = origin
        if isinstance(value, list):  # leaves inside lists are listed by index in `show`
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    _merge({}, origins, item, origin, f"{dotted}.{index}.")


def _validate(schema: type[T], tree: dict[str, Any], origins: Mapping[str, str], base: Path) -> T:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    _forbid_extra(schema, ConfigDict(extra="forbid"))
    try:
        value = TypeAdapter(schema).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = [str(part) for part in first["loc"]]
        dotted = ".".join(location)
        hint = "see `config show` for every key and its default"
        if first["type"] == "unexpected_keyword_argument" or "extra" in first["type"]:
            close = difflib.get_close_matches(location[-1], _field_names(schema), n=1)
            message = f"unknown setting {dotted}"
            hint = f"did you mean {close[0]}?" if close else hint
        else:
            message = f"{dotted}: {first['msg'].removeprefix('Value error, ')}"
        raise ConfigError(
            "config.invalid", message, hint=hint, key=dotted, origin=origins.get(dotted, "default"), errors=error.error_count()
        ) from error
    return typing.cast(T, _absolute_paths(value, base))


def _nested_dataclasses(schema: Any, seen: set[type]) -> None:
    if dataclasses.is_dataclass(schema) and isinstance(schema, type):
        if schema in seen:
            return
        seen.add(schema)
        for hint in typing.get_type_hints(schema).values():
            _nested_dataclasses(hint, seen)
    else:
        for argument in typing.get_args(schema):
            _nested_dataclasses(argument, seen)


def _forbid_extra(schema: Any, config: Any) -> None:
    seen: set[type] = set()
    _nested_dataclasses(schema, seen)
    for cls in seen:
        typing.cast(Any, cls).__pydantic_config__ = config


def _field_names(schema: Any) -> list[str]:
    seen: set[type] = set()
    _nested_dataclasses(schema, seen)
    return sorted({field.name for cls in seen for field in dataclasses.fields(cls)})


def _absolute_paths(value: Any, base: Path) -> Any:
    if isinstance(value, Path):
        return value if value.is_absolute() else base / value
    if isinstance(value, tuple):
        return tuple(_absolute_paths(item, base) for item in value)
    if isinstance(value, Mapping):
        return {key: _absolute_paths(item, base) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _absolute_paths(getattr(value, f.name), base) for f in dataclasses.fields(value) if f.init}
        )
    return value


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, object]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: list[tuple[str, Any]] = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return [(prefix.removesuffix("."), to_plain(value))]
    return [leaf for name, item in items for leaf in _leaves(item, f"{prefix}{name}.")]


def to_plain(value: Any) -> Any:
    """A configuration as JSON values (paths as text, durations in seconds, sizes in bytes)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(schema: type[T], plain: Any) -> T:
    """Inverse of `to_plain` for values that were validated before; checks nothing."""
    return typing.cast(T, _build(schema, plain))


def _build(hint: Any, plain: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _build(typing.get_args(hint)[0], plain)
    if origin in (typing.Union, types.UnionType):
        if plain is None:
            return None
        return _build(next(arm for arm in typing.get_args(hint) if arm is not type(None)), plain)
    if origin is tuple:
        return tuple(_build(typing.get_args(hint)[0], item) for item in plain)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {key: _build(typing.get_args(hint)[1], item) for key, item in plain.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint, include_extras=True)
        return hint(**{name: _build(hints[name], item) for name, item in plain.items()})
    return Path(plain) if hint is Path else plain
