"""Reading a config's YAML: its base, overrides, and errors that name the key."""

from __future__ import annotations

import difflib
import json
import os
import reprlib
from datetime import date
from pathlib import Path
from typing import Any

import pydantic
import yaml

from cpn_fast.config import Config
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply ``key.sub=value`` overrides (values are YAML).

    The key ``base`` names a file, relative to this one, that gives the keys which this file does not have. Raises
    UserError with every problem: an unreadable file, unknown keys (with the nearest known key), wrong values.
    """
    tree = _read(path)
    for override in overrides or []:
        _override(tree, override)
    return parse(tree, str(path))


def _read(path: Path, parents: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the keys of a file and its bases. ``parents`` are the files whose base led here."""
    try:
        tree = _yaml(reading.read_text(path, reading.CONFIG))
    except (FileNotFoundError, IsADirectoryError):
        folders = (path.parent, path, Path("configs"))
        configs = [str(file) for folder in folders for file in sorted(folder.glob("*.yaml"))]
        stems = {Path(name).stem: name for name in reversed(configs)}
        near = difflib.get_close_matches(path.stem, stems, n=1)
        hint = f"Did you mean {stems[near[0]]}? " if near else ""
        names = ", ".join(dict.fromkeys(configs)) or "none in that folder"
        raise UserError(f"{path}: no such config. {hint}There are: {names}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    if "base" not in tree:
        return tree
    named = tree.pop("base")
    if not isinstance(named, str) or not named or "\0" in named:
        raise UserError(f"{path}: base: expected the path of another config, found {named!r}")
    base = path.parent / reading.expanded(Path(named))
    if os.path.realpath(base) in parents:
        raise UserError(f"{path}: base {base} leads back to itself")
    return _merged(_read(base, (*parents, os.path.realpath(base))), tree)


class _Loader(yaml.SafeLoader):
    """YAML forbids a repeated key, but PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            first = seen.setdefault((key.tag, key.value), key) if isinstance(key, yaml.ScalarNode) else key
            if first is not key:
                lines = f"lines {first.start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(problem=f"the key {key.value} occurs twice, in {lines}")
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    """Return the content of YAML. Raises ValueError for text that is none."""
    try:
        return yaml.load(text, _Loader)
    except (RecursionError, yaml.YAMLError) as error:
        raise ValueError(error) from None


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def parse(tree: dict[str, Any], source: str) -> Config:
    """Return the config of a tree of plain values. Raises UserError, which names ``source``, with every problem."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UserError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


def read(text: str, source: str) -> Config:
    """Return the config of YAML as ``dump`` writes it. Raises UserError, which names ``source``, for other text."""
    try:
        tree = _yaml(text)
    except ValueError as error:
        raise UserError(f"{source}: not readable as YAML: {error}") from None
    return parse(tree, source)


def dump(config: Config) -> str:
    """Return the resolved config as YAML. ``load`` reads an equal config from it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(key: str, value: Path) -> str:
    """Return KEY=VALUE as ``load`` takes it, quoted if YAML would read another value."""
    try:
        plain = _yaml(str(value)) == str(value)
    except ValueError:
        plain = False
    return f"{key}={value if plain else json.dumps(str(value))}"


def _override(tree: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"--set {text!r}: expected key.sub=value")
    *parents, last = key.split(".")
    for name in parents:
        section = tree.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {text!r}: {name} is a value, not a section")
        tree[name] = tree = dict(section)  # a copy, because a YAML alias may use the same section elsewhere
    try:
        tree[last] = _yaml(value)
    except ValueError as error:
        raise UserError(f"--set {text!r}: the value is not YAML: {error}") from None


def _explain(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], _known(where[:-1]), n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":  # of the key name alone
        message = "expected only letters, digits, dots, dashes and underscores"
    if problem["type"] in ("missing", "value_error"):
        return f"{key}: {message}" if key else message
    value = reprlib.repr(problem["input"])  # shortened, because YAML aliases may make it endless
    hint = ""
    if problem["type"] == "string_type" and isinstance(problem["input"], (bool, int, float, date, type(None))):
        hint = '; quote it ("no", "7"): YAML does not read no, yes, on, off, null, digits and dates as text'
    return f"{key}: {message}, found {value}{hint}"


def _known(where: list[str]) -> list[str]:
    section: Any = Config
    for name in where:
        section = section.model_fields[name].annotation
    return list(section.model_fields)
