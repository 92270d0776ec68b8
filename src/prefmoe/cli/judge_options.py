"""The options of a judge on the command line: the fields of `JudgeSettings`, with their own descriptions."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from prefmoe.labeling.judge.settings import JudgeSettings

_RENAMED = {"points": "--point"}  # given once a point
_ELSEWHERE = ("judge",)  # may be missing on the command line


def with_judge_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of JudgeSettings; it gets them as `**judge_options`."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_option(name, field)
        )
        for name, field in JudgeSettings.model_fields.items()
        if name not in _ELSEWHERE
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

    def with_options(**values: Any) -> None:
        command(**values)

    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in [*own, *added]} | {"return": None}
    return with_options


def judge_settings(judge: str, options: dict[str, Any]) -> JudgeSettings:
    """The settings; what cannot work is a mistake in usage, and its option is named."""
    try:
        return JudgeSettings(judge=judge, **options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        option = _RENAMED.get(name, f"--{name.replace('_', '-')}") if name else "--judge"
        message = first["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(
            f"{option}: {message}; got {first['input']!r}" if name else message
        ) from error


def _option(name: str, field: FieldInfo) -> Any:
    flags = [_RENAMED[name]] if name in _RENAMED else []
    words = field.description or ""
    sentence = f"{words[:1].upper()}{words[1:]}."
    return Annotated[field.annotation, typer.Option(*flags, help=sentence)]
