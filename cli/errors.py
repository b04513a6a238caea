"""What the user sees when a command fails: one line on stderr and an exit status; a traceback if asked for."""

import re
import sys
import traceback

import typer
from typer.core import TyperGroup

from ..conversion.command_line import process_number

_FAILED, _INTERRUPTED = 2, 130
# Commands that go on where they stopped when they are given again.
_RESUMABLE = {"distill", "finetune", "train"}


class ReportingGroup(TyperGroup):
    """A group of commands whose expected errors end in one line `ssm-zoo: MESSAGE` and exit status 2.

    Expected are the caller's mistakes, files, the network and the Hub. Anything else is a bug and keeps its
    traceback.
    """

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output left, `| head` say: typer ends quietly
        except KeyboardInterrupt:
            again = "; give the same command again to go on" if ctx.invoked_subcommand in _RESUMABLE else ""
            if process_number() == 0:
                _print(f"ssm-zoo: interrupted{again}")
            raise typer.Exit(_INTERRUPTED) from None
        except expected_errors() as error:
            if ctx.params.get("traceback"):
                _print("".join(traceback.format_exception(error)).rstrip())
            elif process := process_number():
                _print(f"ssm-zoo: process {process}: {one_line(error)}")
            else:
                _print(f"ssm-zoo: {one_line(error)}")
            raise typer.Exit(_FAILED) from None


def expected_errors() -> tuple[type[Exception], ...]:
    """The exceptions that are not bugs of this program, as far as modules are loaded that may have raised them."""
    # Those of the Hub's client include the base of the network's errors and those of malformed configurations,
    # which are neither OSError nor ValueError.
    modules = [sys.modules.get("huggingface_hub.errors"), sys.modules.get("safetensors")]
    values = [value for module in modules if module is not None for value in vars(module).values()]
    classes = [value for value in values if isinstance(value, type)]
    return (ValueError, OSError, *(kind for kind in classes if issubclass(kind, Exception)))


def one_line(error: Exception) -> str:
    """The message of an error in one line, its lines separated by semicolons where nothing else separates them."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = ""
    for line in filter(None, (" ".join(line.split()) for line in str(error).splitlines())):
        separator = "" if not text else " " if text.endswith((":", ".", ",", ";")) else "; "
        text += separator + line
    return text or type(error).__name__


def without_tokens(text: str) -> str:
    """The text with every Hub token in it blotted out."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", text)


def _print(text: str) -> None:
    # In one write, so that the lines of several processes do not run into each other.
    sys.stderr.write(f"{without_tokens(text)}\n")
