"""Typed configuration: frozen dataclasses <- YAML <- `key.path=value` overrides. Unknown keys fail.

A field's default, its type and the string under it are the whole documentation: `describe` turns them into help text.
A library was tried first: jsonargparse reads the same dataclasses, but answers a misspelt key without a suggestion.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from asn_rl.errors import AsnError, ConfigError
from asn_rl.files import write_whole

T = TypeVar("T")
OPERATIONAL = {"operational": True}
"""`dataclasses.field(metadata=OPERATIONAL)`: how the work is done, not what comes of it. A run goes on when such a
setting is changed."""


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """A configuration from defaults, a YAML file and overrides such as `rollout.max_new_tokens=64`.

    Raises:
        ConfigError: unreadable file, unknown key (with a suggestion), or a value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.path=value")
        _put(values, key.split("."), _parse(text, override))
    return from_dict(cls, values)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from nested mappings, checking keys and types."""
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ""
            place = f" in {where!r}" if where else ""
            raise ConfigError(f"unknown key {str(key)!r}{place}{guess} Allowed: {', '.join(sorted(names))}")
    arguments = {key: _convert(value, hints[key], f"{where}.{key}".lstrip(".")) for key, value in values.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where or 'configuration'}: {error}") from error
    except AsnError as error:
        raise ConfigError(f"{where or 'configuration'}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a configuration, as they are written to YAML."""
    return _plain(config)


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration, whole or not at all; `load_config` reads it back unchanged."""
    write_whole(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))


def changes(old: Mapping[str, Any], config: Any) -> list[str]:
    """Lines `key.path: old -> new` for every value of a saved configuration that differs now, operational ones aside.

    Args:
        old: plain values, as they were saved. Fields that were added since then have their defaults.
        config: a dataclass, or plain values.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return list(_differences(old, to_dict(config)))
    try:
        before = from_dict(type(config), old)
    except ConfigError:  # of another version
        return list(_differences(old, to_dict(config)))
    return list(_differences(*(_plain(each, operational=False) for each in (before, config))))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        a, b, path = old.get(key), new.get(key), f"{where}.{key}".lstrip(".")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, path)
        elif a != b:
            yield f"{path}: {a!r} -> {b!r}"


def describe(cls: type) -> str:
    """One line per field, nested ones by dotted path: name, type, default, meaning."""
    return "\n".join(_describe(cls, ""))


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The string literals under the fields of a dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _describe(cls: type, prefix: str) -> Iterator[str]:
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _describe(hint, name + ".")
            continue
        default = _default(field)
        shown = "" if default is dataclasses.MISSING else f"={yaml.safe_dump(_plain(default), default_flow_style=True)}"
        yield f"  {name}{shown.removesuffix(chr(10)).removesuffix('...').strip()}  ({_type_name(hint)})"
        if doc := docs.get(field.name):
            doc += ". A run goes on when it is changed" if field.metadata.get("operational") else ""
            yield textwrap.fill(doc, 100, initial_indent="      ", subsequent_indent="      ")
        mark = "[]." if get_origin(hint) in (tuple, list) else "."
        for section in get_args(hint):
            if dataclasses.is_dataclass(section):
                yield from _describe(section, name + mark)  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "null"
    if get_origin(hint) in (tuple, list):
        return f"list of {_type_name(get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a mapping of keys")
        return from_dict(hint, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(value, options, where)
    if origin is Literal:
        if value not in options:
            raise _wrong(where, value, f"one of {', '.join(map(repr, options))}")
        return value
    if origin in (tuple, list, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong(where, value, "a list")
        items = [_convert(item, options[0], f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a mapping")
        return dict(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            raise _wrong(where, value, "a number") from None
        if math.isnan(number):  # passes every comparison with a range, and equals no saved configuration
            raise _wrong(where, value, "a number")
        return number
    if not isinstance(value, typing.cast(type, hint)) or (hint is not bool and isinstance(value, bool)):
        raise _wrong(where, value, f"a value of type {_type_name(hint)}")
    return value


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    structured = [option for option in options if option is not type(None)]
    if isinstance(value, Mapping | list) and len(structured) == 1:
        return _convert(value, structured[0], where)  # its error names the key inside
    for option in options:
        try:
            return _convert(value, option, where) if option is not type(None) else _none(value, where)
        except ConfigError:
            continue
    raise _wrong(where, value, " or ".join(_type_name(option) for option in options))


def _none(value: Any, where: str) -> None:
    if value is not None:
        raise _wrong(where, value, "null")


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where} must be {expected}, got {value!r}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(values).__name__}")
    return values


def _parse(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML: {error}") from error


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override of {'.'.join(path)!r}: {key!r} is not a section")
    values[path[-1]] = value


def _plain(value: Any, operational: bool = True) -> Any:
    """Dataclasses and tuples as mappings and lists, with operational settings or without."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name), operational)
            for field in dataclasses.fields(value)
            if operational or not field.metadata.get("operational")
        }
    if isinstance(value, Mapping):
        return {key: _plain(item, operational) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, operational) for item in value]
    return value
