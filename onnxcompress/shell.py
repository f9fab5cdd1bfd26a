"""What every command shares: one answer on stdout, errors and exit codes, logging, progress.

A command is a function that returns an :class:`Answer`; :func:`command` registers it with the options
all have, and :func:`run` runs a command line so that nothing but the answer reaches stdout.

Exit codes: those of :mod:`onnxcompress.errors`, and

    0    done
    1    ``verify``: the models differ by more than allowed
    70   a bug in onnxcompress (or in a plug-in)
    130  interrupted; 141  the reader of our output went away; 143  terminated
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import RenderableType
from rich.status import Status
from rich.text import Text

from onnxcompress import tables
from onnxcompress.errors import OnnxCompressError, OutputError

__all__ = ["Answer", "command", "examples", "progress", "run", "warn", "writable"]

BUG, INTERRUPTED, PIPE_CLOSED, TERMINATED = 70, 130, 141, 143


@dataclass(frozen=True)
class Answer:
    """What a command found: ``document`` is printed with --json, ``text`` without."""

    document: object
    text: RenderableType
    status: int = 0


def run(group: click.Group, arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit status; never raises, never prints a bare traceback."""
    words = list(arguments)
    as_json = "--json" in words
    try:
        with _termination_raises():
            status = group.main(words, prog_name="onnxcompress", standalone_mode=False)
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except OnnxCompressError as error:
        return _fail(error.message, error.hint, type(error).__name__, error.exit_code, as_json)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "onnxcompress"
        return _fail(error.format_message(), f"see {command} --help", "UsageError", 2, as_json)
    except click.ClickException as error:
        return _fail(error.format_message(), "", "UsageError", error.exit_code, as_json)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing is left half-written", "", "Interrupted", INTERRUPTED, as_json)
    except _Terminated:
        return _fail("terminated; nothing is left half-written", "", "Terminated", TERMINATED, as_json)
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        if any(w.startswith("-v") and set(w[1:]) == {"v"} for w in words) or "--verbose" in words:
            traceback.print_exc()
        message = f"this is a bug: {type(error).__name__}: {error}"
        hint = "run again with -v for the traceback, and please report it with the command line"
        return _fail(message, hint, "Bug", BUG, as_json)


def _fail(message: str, hint: str, kind: str, status: int, as_json: bool) -> int:
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            click.echo(tables.as_json({"error": {"type": kind, "message": message, "hint": hint}}))
        else:
            click.secho(f"error: {message}", fg="red", err=True)
            if hint:
                click.echo(f"hint: {hint}", err=True)
    return status


def _reader_gone() -> int:
    with contextlib.suppress(OSError):  # or Python complains again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


class _Terminated(BaseException):
    """SIGTERM, raised so that temporary files are removed on the way out."""


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- commands ----------------------------------------------------------------------------------


def command(group: click.Group, name: str, *lines: str) -> Callable[[Callable[..., Answer]], click.Command]:
    """Registers a command that answers, with --json and -v; only the answer goes to stdout."""

    def register(function: Callable[..., Answer]) -> click.Command:
        @functools.wraps(function)
        def answered(*, as_json: bool, verbose: int, **arguments: Any) -> int:
            with _logging(verbose), contextlib.redirect_stdout(sys.stderr):  # a user's metric may print
                answer = function(verbose=bool(verbose), **arguments)
            try:
                if as_json:
                    click.echo(tables.as_json(answer.document))
                else:
                    tables.show(answer.text, sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # here, for click would make it an exit code of 1
                return _reader_gone()
            return answer.status

        made = group.command(name, epilog=examples(*lines))(answered)
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document and nothing else."),
            click.Option(["-v", "--verbose"], count=True, help="Log to stderr and list every row; -vv for more."),
        ]
        return made

    return register


def examples(*lines: str) -> str | None:
    """Lines for the end of a help text, marked as ones click must not wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


@contextlib.contextmanager
def _logging(verbose: int) -> Iterator[None]:
    logger = logging.getLogger("onnxcompress")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    level, before = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)], logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def writable(path: Path, *, what: str) -> None:
    """Says before a long run that its result could not be written.

    Raises:
        OutputError: no such folder, not writable, or ``path`` is a folder.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{what}: there is no folder {folder}", hint="make it first")
    if path.is_dir():
        raise OutputError(f"{what}: {path} is a folder", hint="name a file")
    try:  # os.access knows nothing of read-only mounts, and root may do anything by its account
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{what}: cannot write in {folder}: {error.strerror}", hint="choose another place") from error


# --- what happens meanwhile --------------------------------------------------------------------


def warn(message: str) -> None:
    click.secho(f"WARNING: {message}", fg="yellow", bold=True, err=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A line on a terminal for what takes over a second; nothing where stderr is none."""
    if not sys.stderr.isatty():
        yield None
        return
    status = Status("", console=tables.console(sys.stderr))
    timer = threading.Timer(1.0, status.start)
    timer.daemon = True

    def show(stage: str, done: int, total: int | None) -> None:
        status.update(Text(f"{stage} {done}/{total}" if total else f"{stage} {done}" if done else stage))

    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()
        status.stop()
