"""The way in and out: runs the command line, and turns what stopped it into one message and an exit code."""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

from mmtune.errors import EXIT_FOLDER, DataError, Interrupted, MmtuneError, RecipeError, ResourceError
from mmtune.signals import end_where_deaf, exit_code_of, hear, ignore_stops
from mmtune.talk import json_line

# What the system says of a path that cannot be one, or that is gone while a command works.
_REFUSED_PATHS = frozenset(
    {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENOENT, errno.EIO, errno.ESTALE}
)


# A command of a stage in a hint, not yet followed by a recipe.
_COMMAND = re.compile(
    r"\bmmtune (?:extract|build-data|prompt|tokenize|pretrain|finetune|eval|export|run)(?![\w-]| [\w./']| --help)"
)
# The signal that asked this process to stop; Typer makes an exit code of the interrupt and drops the rest.
_asked: list[int] = []
# When signals came during an import; each is sent again a little later.
_put_off: list[float] = []
_PUT_OFF_SECONDS = 0.02
# How long an import, or one of several processes, may take to hear a signal: schedulers and torchrun wait 30 seconds
# before they kill.
_HEARD_SECONDS = 3.0


def _stop(number: int, frame: FrameType | None) -> None:
    """Stops what runs; an import runs to its end first, because libraries of C++ end the process on an exception.

    Where that takes long, as from a slow disk, the process ends as by a kill: nothing that stands aside is lost by it.
    """
    if _asked and number != signal.SIGINT:
        # What stops already needs no second word; timeout(1) sends two.
        return
    if _is_import(frame):
        _put_off.append(time.monotonic())
        if _put_off[-1] - _put_off[0] > _HEARD_SECONDS:
            _end_deaf(number)
        again = threading.Timer(_PUT_OFF_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    _asked.append(number)
    raise KeyboardInterrupt


def _is_import(frame: FrameType | None) -> bool:
    """Says whether a frame belongs to a module that is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def main() -> None:
    """Runs the command line and exits with the code of the contract."""
    _asked.clear()
    _put_off.clear()
    _wait_briefly()
    _keep_few_kernels()
    _open_streams()
    hear(_stop)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_where_deaf(_stop, _asked, _put_off, _end_deaf, _HEARD_SECONDS)
    try:
        code = _answer()
    except BrokenPipeError:
        # Nobody reads on; what is still in the buffers must not fail once more when Python ends.
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 141
    # What is done is done: while libraries are taken down a signal would still change the exit code.
    atexit.register(ignore_stops)
    sys.exit(code)


def _wait_briefly() -> None:
    """Lets threads that compute together wait for each other in a loop for 0.1 ms at most, not for some 5 ms.

    Where another process works on one of their cores, the thread that the others wait for needs the core on which they
    loop: products took twelve times as long beside one busy process, and take 1.7 times as long this way. Where the
    cores are free this costs nothing. Read once, when OpenMP (GNU's, as in PyTorch) is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _keep_few_kernels() -> None:
    """Lets oneDNN keep 256 kernels, not 1,024: each may take a megabyte, and products ask for few shapes by design."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def _end_deaf(number: int) -> None:
    """Ends this process at once, wherever its main thread is; what stands aside is swept later."""
    # While a command runs, what libraries print to stdout goes to stderr.
    sys.stdout = sys.__stdout__ or sys.stdout
    os._exit(_fail(_stopped(number)))


def _stopped(number: int) -> Interrupted:
    stopped = Interrupted("stopped; nothing was half-written", "run the same command again")
    stopped.exit_code = exit_code_of(number)
    return stopped


def _open_streams() -> None:
    """Opens standard streams that are closed, lest a stage's file becomes one; what they cannot show is escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _answer() -> int:
    """Returns the exit code of the command line, after saying what stopped it."""
    try:
        return _run()
    except MmtuneError as error:
        return _fail(error)
    except KeyboardInterrupt:
        # Python keeps in mind that one went through an `exec` of text, and would end by SIGINT: the next one clears it.
        exec("")
        ignore_stops()
        return _fail(_stopped(next((each for each in _asked if each != signal.SIGINT), signal.SIGINT)))
    except BrokenPipeError:
        raise
    except Exception as error:
        known = _known(error)
        if known is None:
            if EXIT_FOLDER in os.environ:
                _fail(MmtuneError(f"a process of this run has a bug: {error}", "see its traceback above"))
            elif "--json" in sys.argv:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                _fail(MmtuneError(f"a bug of mmtune: {said}", "report it with the traceback below", "bug"))
            raise
        return _fail(known)


def _run() -> int:
    # Imported here, so that an interrupt during the imports is answered too.
    import typer

    from mmtune.cli import app
    from mmtune.files import disk_errors

    try:
        with disk_errors("writing failed"):
            code = app(standalone_mode=False, prog_name="mmtune") or 0
    except typer.Exit as error:
        code = error.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except SystemExit as error:
        # Typer's own answer to a closed pipe; nothing here exits that way.
        raise BrokenPipeError from error
    if _asked and code == 130:
        raise KeyboardInterrupt
    sys.stdout.flush()
    return code


def _known(error: Exception) -> MmtuneError | None:
    """Returns what to say of an error from below, or None for a bug of ours."""
    if isinstance(error, PermissionError):
        return DataError(f"{error.filename or error} may not be read or written", "check its rights", "unreadable")
    if isinstance(error, OSError) and error.errno in _REFUSED_PATHS and error.filename:
        path = str(error.filename)
        shown = path if len(path) <= 120 else f"{path[:60]}...{path[-50:]}"
        return DataError(f"{shown}: {error.strerror}", "check this path in the recipe or command", "bad_path")
    if isinstance(error, FileNotFoundError) and _is_gone():
        return DataError("the folder that this runs in is gone", "change to another folder", "bad_path")
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        # tempfile tries to write in each place that it knows.
        return ResourceError("no temporary folder can be written", "free some space, or set TMPDIR to a folder")
    if any(kind.__name__ in ("OutOfMemoryError", "MemoryError") for kind in type(error).__mro__):
        return ResourceError(
            f"memory ran out: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "lower batch_rows or batch_tokens (raise accumulate as much), or set finetune.checkpointing",
        )
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        # A usage error of Typer, whose classes have no public name.
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mmtune"
        return RecipeError(str(error.format_message()), f"see: {command} --help", "usage")
    return None


def _is_gone() -> bool:
    """Says whether the folder that this process runs in was removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _with_recipe(hint: str) -> str:
    """Returns a hint whose commands name the recipe that this command was given, with what it set over it."""
    words = sys.argv[2:]
    given = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word][:1]
    for at, word in enumerate(words):
        name, joined, value = word.partition("=")
        if name in ("--set", "--seed") and (joined or at + 1 < len(words)):
            given += [name, value if joined else words[at + 1]]
    return _COMMAND.sub(lambda found: f"{found[0]} {shlex.join(given)}", hint) if given else hint


def _fail(error: MmtuneError) -> int:
    error.hint = _with_recipe(error.hint)
    document = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    if EXIT_FOLDER in os.environ:
        # The command that launched this process speaks; of several the first to fail is the cause.
        (Path(os.environ[EXIT_FOLDER]) / os.environ.get("RANK", "0")).write_text(json.dumps(document), "utf-8")
        return error.exit_code
    if "--json" in sys.argv and os.environ.get("RANK", "0") == "0":
        _print(json_line({"ok": False, "error": document}), sys.stdout)
    _print(f"error: {error.message}" + (f"\n  next: {error.hint}" if error.hint else ""), sys.stderr)
    return error.exit_code


def _print(text: str, stream: TextIO) -> None:
    """Prints where that is possible: a full disk under one stream does not keep the other from being told."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        # What the stream holds would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
