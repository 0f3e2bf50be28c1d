"""The command line: ``vpfast COMMAND``. Each command is a module of its own, imported when it is asked for."""

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vpfast._version import __version__
from vpfast.ops._backend import BackendError

COMMANDS = {
    "data": "prepare a data set for training: decoded once, checked, fast to read",
    "train": "train a model on videos or moving digits",
    "predict": "predict how a video goes on; writes GIF, MP4, PNG and NPY",
    "evaluate": "measure a trained model on held-out clips",
    "encode": "write a video as the bit-packed codes of a trained HR-VQVAE",
    "decode": "make the frames of such a file again; writes GIF, MP4 and NPY",
    "visualize": "draw what trained models make of a video, and what their codes hold",
    "report": "write one HTML page: errors, curves and clips that play",
    "export": "write a trained model as a file that runs without its code",
    "bench": "time the operators and models beside their peers; compare two such records",
    "doctor": "show what is installed and which backend serves each operator",
}

# The import name of a package that may be missing, and the extra that brings it.
EXTRAS = {
    "av": "cli",
    "matplotlib": "cli",
    "PIL": "cli",
    "tqdm": "cli",
    "jsonargparse": "cli",
    "yaml": "cli",
    "accelerate": "cli",
    "sklearn": "demo",
}


# Errors of the system that the request is to blame for, beside those that Python has names for.
_NO_SUCH_PLACE = frozenset({errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL, errno.ENXIO})

_LONGEST = 1000  # characters of an error: it holds what was given, which may be a book


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed on the way, 2 the request cannot be served.

    ``vpfast train`` and ``vpfast predict --live``, stopped by a signal, give 128 + its number, and so does any command
    whose output is no longer read.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    return answered(lambda: _run(args), f"vpfast {args[0]}" if args else "vpfast")


def _run(args: list[str]) -> int:
    if args and args[0] in COMMANDS:
        command = importlib.import_module(f"vpfast.cli.{args[0]}")
        return int(command.run(args[1:]))
    _parser().parse_args(args)
    return 0


def answered(work: Callable[[], int], command: str) -> int:
    """The exit code of ``work``; what it raises becomes one line on stderr, where it is not a defect."""
    try:
        try:
            return work()
        finally:
            if sys.stdout is not None:  # None where its descriptor is closed
                sys.stdout.flush()
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer has a place to go
        return 128 + signal.SIGPIPE
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("VPFAST_TRACEBACK"):
            raise
        print(f"vpfast: {_sentence(error, command)}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _exit_code(error: Exception) -> int | None:
    """None for what is no answer to the user but a defect: that keeps its traceback."""
    if signum := getattr(error, "signum", None):
        return 128 + int(signum)
    if isinstance(error, FloatingPointError):
        return 1
    if isinstance(error, ImportError):
        return 2 if _extra(error) or "pip install" in str(error) else None
    if isinstance(error, ValueError | BackendError):
        return 2
    if isinstance(error, OSError):
        asked = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError
        return 2 if isinstance(error, asked) or error.errno in _NO_SUCH_PLACE else 1
    return 1 if _out_of_memory(error) else None


def _sentence(error: Exception, command: str) -> str:
    if isinstance(error, ImportError) and (extra := _extra(error)):
        return f"`{command}` needs the package {error.name}, which is not installed: pip install 'vpfast[{extra}]'"
    if _out_of_memory(error):
        said = f"there is not enough memory for it ({error})"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        said = str(error)
    return _printable(" ".join(said.split()))


def _out_of_memory(error: Exception) -> bool:
    """PyTorch says so in words, and of a GPU in a class of its own."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def _printable(text: str) -> str:
    """Without what would drive a terminal, and of a length that can be read."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 300]} [...] {shown[-280:]}"


def _extra(error: ImportError) -> str | None:
    """The extra that brings the package that could not be imported."""
    return EXTRAS.get((error.name or "").partition(".")[0])


def check_values(args: Sequence[str]) -> None:
    """Raise ValueError for ``--name=--``, which argparse takes for an empty list."""
    for arg in args:
        if arg.startswith("--") and arg.endswith("=--"):
            raise ValueError(f"{arg}: -- is no value")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is a ValueError, told in one line like any other."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        check_values(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message} (`{self.prog} --help` shows what is accepted)")


def _parser() -> Parser:
    listing = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="vpfast",
        description="Fast video prediction in PyTorch.",
        epilog=f"commands:\n{listing}\n\n`vpfast COMMAND --help` explains one. Exit status: 0 done, 1 failed on the "
        "way, 2 cannot be\nserved as asked. VPFAST_TRACEBACK=1 in the environment shows where an error came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--version", action="version", version=f"vpfast {__version__}")
    return parser
