"""Options of the commands: those generated from the fields of settings, and those shared by several commands."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ..harness.settings import Option, SettingsBase

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a model or tokenizer brings along. Read it first; models of the zoo need none.",
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit, for a Hub id.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything that is drawn at random.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Data type of the weights; auto is the checkpoint's own."),
]
Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="Folder of the run. A run with the same settings is resumed.")
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to this repository after training."),
]
Private = Annotated[bool, typer.Option("--private", help="Push to a private repository only.")]


def with_settings(kind: type[SettingsBase]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an argument or option for every field of its settings.

    The command's first parameter is a dict from the names of the fields to the values on the command line; fields that
    are not on the command line are not in it. The other parameters are typer's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = kind.model_fields
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        made = [_parameter(name, field) for name, field in fields.items()]
        arguments = [parameter for parameter in made if _option(fields[parameter.name]).argument]
        options = [parameter for parameter in made if parameter not in arguments]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        # Arguments come in the order of the parameters; required options are listed first.
        options.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        parameters = [*arguments, *own, *options]

        @functools.wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            values = {}
            for name, field in fields.items():
                value, parse = given.pop(name), _option(field).parse
                source = context.get_parameter_source(name)
                if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
                    values[name] = value if parse is None else parse(value)
            command(values, **given)

        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        signature = inspect.Signature([context, *keywords])
        run.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        return run

    return decorate


def _option(field: FieldInfo) -> Option:
    """Return the option of a field."""
    return next((each for each in field.metadata if isinstance(each, Option)), Option())


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return typer's parameter for a field."""
    option, required = _option(field), field.is_required()
    assert field.description is not None, f"{name} has no docstring"
    about: dict[str, Any] = {"help": " ".join(field.description.split()), "metavar": option.metavar}
    if option.argument:
        kind: Any = Annotated[str, typer.Argument(**about)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
    kind = str if option.parse is not None else _typed(field.annotation)
    default = field.default
    if option.default is not None:
        kind, default, required = kind | None, None, False
        about["help"] += f"  [default: {option.default}]"
    elif default is None or default == []:
        kind, default = kind | None, None
    switch = option.name or f"--{name.replace('_', '-')}"
    if option.negative:
        switch += f"/--no-{name.replace('_', '-')}"
    annotation = Annotated[kind, typer.Option(switch, **about)]
    default = inspect.Parameter.empty if required else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _typed(annotation: Any) -> Any:
    """Return the type of a field without its constraints and its None, as typer understands it."""
    if get_origin(annotation) is Annotated:
        return _typed(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not type(None))
        return _typed(kind)
    if get_origin(annotation) is list:
        return list[_typed(get_args(annotation)[0])]
    return annotation
