"""Whether there is a torch that vpfast runs with: looked at before anything else is imported."""

import os
import sys


def _refusal() -> ImportError | None:
    """What is wrong with the torch that is installed, and what to run."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return ModuleNotFoundError(
            "vpfast needs torch 2.11 or later, and none is installed: pip install torch, "
            "or pip install torch --index-url https://download.pytorch.org/whl/cpu for a build without CUDA",
            name="torch",
        )
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return ImportError(f"vpfast needs torch 2.11 or later, found {torch.__version__}: pip install --upgrade torch")
    return None


def _is_command_line() -> bool:
    """Whether this process is ``vpfast ...`` or ``python -m vpfast ...``."""
    program: str = (getattr(sys, "argv", None) or [""])[0]
    if program != "-m":
        return os.path.basename(program) == "vpfast"
    # While Python looks for the module of -m, its own command line alone has the name.
    given = sys.orig_argv
    return "-m" in given and given[given.index("-m") + 1].split(".")[0] == "vpfast"


if (_refused := _refusal()) is not None:
    # The command line answers in one line, and this package is imported before it can.
    if _is_command_line() and not os.environ.get("VPFAST_TRACEBACK"):
        print(f"vpfast: {_refused}", file=sys.stderr)
        sys.exit(2)
    raise _refused
