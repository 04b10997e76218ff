"""Write docs/config.md from the docstrings in cpn_fast/config.py: ``python docs/config_reference.py``."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
import pydantic
import yaml

from cpn_fast.config import Config

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Configuration keys

This page lists every key of a config (a YAML as in `configs/`), with its type, its default and its meaning.
`--set section.key=value` overrides a key on the command line. `base: FILE` takes over the keys of another file.
`python docs/config_reference.py` generates the page from `cpn_fast/config.py`.
"""
FOLLOWS = {"data.train_list": "the value of `labels`", "data.eval_list": "the value of `train_list`"}
"""Defaults that another key sets."""


def page() -> str:
    return HEAD + "\n".join(_section("", Config))


def _section(prefix: str, section: type[pydantic.BaseModel]) -> list[str]:
    """Return the heading and the table of a section's keys, then its inner sections."""
    lines = [f"\n## {prefix.rstrip('.') or 'Top level'}\n", _flat(section.__doc__), ""]
    lines += ["| Key | Type | Default | |", "|---|---|---|---|"]
    inner: list[str] = []
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None and prefix == "":
            inner += _section(f"{name}.", nested)
        elif nested is not None:
            lines.append(
                f"| `{name}` | keys of `{_likeness(nested)}` | {_changes(nested, field)} | {_flat(field.description)} |"
            )
        else:
            default = "required" if field.is_required() else FOLLOWS.get(prefix + name, _default(field.get_default()))
            kind = _type(field.annotation, field.metadata)
            lines.append(f"| `{name}` | {kind} | {default} | {_flat(field.description)} |")
    return (lines if len(lines) > 5 else lines[:2]) + inner


def _nested(annotation: Any) -> type[pydantic.BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) else None


def _type(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], list(arguments[1:]))
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part, metadata) for part in arguments)
    if origin is tuple:
        inner = _type(arguments[0], [])
        return f"list of {inner}" if arguments[-1] is ... else f"{len(arguments)} of {inner}"
    name = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}.get(annotation)
    return (name or annotation.__name__) + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    flat = [part for item in metadata for part in getattr(item, "metadata", [item])]
    bounds = [
        f"{signs[type(part)]} {getattr(part, type(part).__name__.lower()):g}" for part in flat if type(part) in signs
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _likeness(section: type[pydantic.BaseModel]) -> str:
    """Return the name of the top-level section whose keys this section has, with other defaults."""
    sections = {field.annotation: name for name, field in Config.model_fields.items()}
    return next(sections[base] for base in section.__mro__ if base in sections)


def _changes(section: type[pydantic.BaseModel], field: Any) -> str:
    like = Config.model_fields[_likeness(section)].annotation.model_fields
    values = field.get_default().model_dump(mode="json")
    changed = {
        name: value for name, value in values.items() if like[name].is_required() or value != _plain(like[name].default)
    }
    return f"as there, but {_default(changed)}" if changed else "as there"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _default(value: Any) -> str:
    value = str(value) if isinstance(value, Path) else _plain(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()
    return f"`{text}`" if len(text) < 200 else f"{len(value)} values"


def _flat(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
