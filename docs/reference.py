"""The parts of docs/*.md that come from the code: cog writes them (`make docs`), `make check` compares them."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def cli_reference() -> str:
    """Every command with its arguments and options, as typer's own docs writer prints them."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from prefmoe.cli.app import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="prefmoe"), name="prefmoe")
    return "\n" + text.strip().removeprefix("# `prefmoe`\n") + "\n"  # the page has its own title


def settings_reference() -> str:
    """One table a section of the file that `prefmoe reward train` reads."""
    from prefmoe.reward.settings import RewardSettings

    return _tables(RewardSettings)


def policy_settings_reference() -> str:
    """One table a section of the file that `prefmoe policy train` reads."""
    from prefmoe.policy.settings import PolicySettings

    return _tables(PolicySettings)


def _tables(settings: type[BaseModel]) -> str:
    tables = [
        f"### `{path}`\n\n{_first_line(section)}\n\n{_table(section)}"
        for path, section in _sections(settings)
    ]
    own = f"### top level\n\n{_table(settings)}"
    return "\n" + "\n\n".join([*tables, own]) + "\n"


def judge_reference() -> str:
    """The settings of a judge, as training configs and the command line have them."""
    from prefmoe.labeling.judge.settings import JudgeSettings

    return f"\n{_table(JudgeSettings)}\n"


def rules_reference() -> str:
    """The rules that can label a capability offline, each with the first sentence of its docstring."""
    from prefmoe.labeling import RULES

    rows = [f"| `{name}` | {_first_line(rule)} |" for name, rule in sorted(RULES.items())]
    return "\n" + "\n".join(["| rule | what it approximates |", "| --- | --- |", *rows]) + "\n"


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def _table(model: type[BaseModel]) -> str:
    sections = {name for name, _ in _sections(model)}
    rows = [_row(name, field) for name, field in model.model_fields.items() if name not in sections]
    return "\n".join(["| key | values | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _row(name: str, field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(bound, attribute)}"
        for bound in field.metadata
        for attribute, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}.items()
        if getattr(bound, attribute, None) is not None
    ]
    values = _type_name(field.annotation) + (f", {' and '.join(limits)}" if limits else "")
    default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
    return f"| `{name}` | {values} | {default} | {field.description or ''} |".replace("\n", " ")


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{{{next(iter(annotation.model_fields))}: ...}}`"  # a section, by its first key
    if origin is Literal:
        return ", ".join(f"`{_yaml(part)}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in parts)
    if origin is list:
        return f"list of {_type_name(parts[0])}"
    words = {str: "text", float: "number", int: "whole number", bool: "`true`, `false`", type(None): "`null`"}
    return words[annotation]


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
