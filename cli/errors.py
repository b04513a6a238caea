"""The outcome of a command that fails: one line on stderr and an exit status; a traceback on request.

The status is 2 for what the caller can fix (arguments, files, the network, the Hub, memory), 1 for a bug of ssm-zoo,
130 after an interrupt and 143 after a termination.
"""

import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import quote

import typer
from typer.core import TyperCommand, TyperGroup

from ..harness.processes import process_number
from ..harness.published import DecorationWarning

_BUG, _FAILED, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143
# Commands that resume where they stopped when they are run again.
_RESUMABLE = {"distill", "finetune", "select", "train"}
# Libraries whose errors, of any class, are about files, the network or the Hub. This decides the status and the
# wording, not whether the message is one line.
_OUTSIDE = ("huggingface_hub", "httpx", "httpcore", "safetensors", "hf_xet", "yaml")
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|bad_alloc", re.IGNORECASE)
# What waiting for a process that has ended raises in the others.
_ENDED = re.compile(r"connection closed by peer|connection reset by peer|remote process exited", re.IGNORECASE)


class ReportingGroup(TyperGroup):
    """A group of commands whose every error ends in one line `ssm-zoo: MESSAGE`.

    An error that the caller cannot fix is a bug: its line says so, names the command, and points to a private file with
    the traceback.
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _usage_in_one_line():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> object:
        with reported(lambda: ctx.invoked_subcommand, lambda: bool(ctx.params.get("traceback"))):
            return super().invoke(ctx)


class ReportingCommand(TyperCommand):
    """A program of one command whose errors end like those of a :class:`ReportingGroup`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _usage_in_one_line(info_name):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> object:
        with reported(lambda: ctx.info_name, lambda: False):
            return super().invoke(ctx)


@contextmanager
def reported(command: Callable[[], str | None], with_traceback: Callable[[], bool]) -> Iterator[None]:
    """Report the error that ends the body in one line, and exit with its status.

    Args:
        command: returns the name of the command; called when there is an error.
        with_traceback: returns whether to show the traceback instead.
    """
    try:
        with _terminable(), _short_warnings(), _logs_without_tokens(), _usage_in_one_line():
            yield
    except BrokenPipeError:
        raise  # the reader of our output left, e.g. `| head`: typer ends quietly
    except (typer.Exit, typer.Abort):
        raise
    except (KeyboardInterrupt, _TerminatedError) as error:
        again = "; run the same command again to resume" if command() in _RESUMABLE else ""
        terminated = isinstance(error, _TerminatedError)
        if process_number() == 0:
            _print(f"ssm-zoo: {'terminated' if terminated else 'interrupted'}{again}")
        raise typer.Exit(_TERMINATED if terminated else _INTERRUPTED) from None
    except Exception as error:  # the outermost frame, the only place that catches everything
        if _is_usage(error):
            raise
        expected = is_expected(error)
        if with_traceback():
            _print(_traceback(error))
        else:
            text = one_line(error) if expected else _bug_line(error, command() or "?")
            process = process_number()
            _print(f"ssm-zoo: process {process}: {text}" if process else f"ssm-zoo: {text}")
        raise typer.Exit(_FAILED if expected else _BUG) from None


def is_expected(error: BaseException) -> bool:
    """Return whether an error is about arguments, files, the network, the Hub or memory. Otherwise it is a bug."""
    if isinstance(error, (ValueError, OSError, MemoryError)) or _is_out_of_memory(error) or _is_left_alone(error):
        return True
    return any(kind.__module__.startswith(_OUTSIDE) for kind in type(error).__mro__)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, its lines separated by semicolons where no punctuation does."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{_printable(error.filename)}: {error.strerror}"
    text = ""
    for line in filter(None, (" ".join(line.split()) for line in str(error).splitlines())):
        separator = "" if not text else " " if text.endswith((":", ".", ",", ";")) else "; "
        text += separator + line
    if _is_out_of_memory(error):
        return f"out of memory: {text or type(error).__name__}; use a smaller model, batch or length"
    if _is_left_alone(error):
        return f"another process of this run has ended or cannot be reached; its message says why ({text})"
    return _printable(text) or type(error).__name__


def without_tokens(text: str) -> str:
    """Return the text with every Hub token in it replaced by ***, including one that a server sent back."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import get_stored_tokens

    known = {get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}
    known |= set(get_stored_tokens().values())  # of `hf auth login`, including those not in use
    for token in sorted(filter(None, known), key=len, reverse=True):
        for form in {token, quote(token, safe=""), quote(token), b64encode(token.encode()).decode()}:
            text = re.sub(re.escape(form), "***", text, flags=re.IGNORECASE)  # %2F is %2f as well
    text = re.sub(r"(?i)\b(bearer\s+)[^\s'\",;]+", r"\1***", text)
    text = re.sub(r"(\w://)[^\s/@:]+:[^\s/@]+@", r"\1***@", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", text)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def _is_left_alone(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _ENDED.search(str(error)) is not None


def _bug_line(error: BaseException, command: str) -> str:
    """Return the line about an unexpected error."""
    message = one_line(error)
    kind = type(error).__name__
    reason = kind if message == kind else f"{kind}: {message}"
    where = _write_log(_traceback(error))
    pointer = f"its traceback is in {where}" if where else "--traceback shows where"
    return f"{command}: unexpected error, a bug of ssm-zoo: {_shortened(reason)} ({pointer})"


def _write_log(text: str) -> str | None:
    """Write a traceback into a new private file; return its path, or None if no file can be written."""
    try:
        handle, path = tempfile.mkstemp(prefix="ssm-zoo-", suffix=".log")  # mode 0600
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{without_tokens(text)}\n")
    except OSError:
        return None
    return path


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _shortened(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _printable(text: str | bytes) -> str:
    """Return the text with escapes for everything that a terminal or UTF-8 cannot represent."""
    text = os.fsdecode(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _print(text: str) -> None:
    # One write, so that the lines of several processes are not mixed.
    line = without_tokens(text).encode("utf-8", "backslashreplace").decode("utf-8")
    sys.stderr.write(f"{line}\n")


def _is_usage(error: BaseException) -> bool:
    """Return whether typer prints the error itself: it has an exit code and a `show`."""
    return hasattr(error, "exit_code") and hasattr(error, "show")


@contextmanager
def _usage_in_one_line(program: str | None = None) -> Iterator[None]:
    """Report a mistake in the command line in one line, like other errors; typer would print four.

    Args:
        program: name of the program if it is not `ssm-zoo`.
    """
    try:
        yield
    except Exception as error:
        if not _is_usage(error) or type(error).__name__ == "NoArgsIsHelpError":
            raise
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "ssm-zoo"
        told: Any = error
        message = " ".join(told.format_message().split()).rstrip(".")
        name = "" if program else " ".join(command.split()[1:])
        help_of = program or " ".join(["ssm-zoo", *name.split()])
        _print(f"ssm-zoo: {name + ': ' if name else ''}{message}; see {help_of} --help")
        raise typer.Exit(_FAILED) from None


class _TerminatedError(BaseException):
    """SIGTERM or SIGHUP was received: half-written files are removed, as after an interrupt."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Make a termination end the body like an interrupt, so that no temporary file and no child process is left."""

    def end(_number: int, _frame: object) -> None:
        raise _TerminatedError

    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may
    # A signal that is ignored, e.g. under nohup, is still ignored.
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _logs_without_tokens() -> Iterator[None]:
    """Replace tokens in what any library logs: a server may have sent one back."""
    usual = logging.getLogRecordFactory()
    busy = threading.local()  # looking up the tokens may itself log

    def make(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = usual(*arguments, **options)
        if not getattr(busy, "now", False):
            busy.now = True
            try:
                _replace_tokens(record)
            finally:
                busy.now = False
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(usual)


def _replace_tokens(record: logging.LogRecord) -> None:
    try:
        text = record.getMessage()
    except (TypeError, ValueError, KeyError):
        return  # the arguments do not fit the text: logging reports that itself
    shown = without_tokens(text)
    if shown != text:
        record.msg, record.args = shown, None
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = without_tokens("".join(traceback.format_exception(*record.exc_info)).rstrip())


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print this package's warnings about missing decorations in one line, and others as usual without tokens."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, DecorationWarning):
            text = without_tokens(str(message))
            usual(message if text == str(message) else text, category, filename, lineno, file, line)
        elif process_number() == 0:
            _print(f"warning: {' '.join(str(message).split())}")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual
