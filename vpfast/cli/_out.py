"""Where a command writes: refused, by the name of the option, before anything is computed."""

from pathlib import Path

from vpfast._files import file_refusal, refusal


def check_out_folder(out: Path, force: bool, files: frozenset[str]) -> bool | frozenset[str]:
    """What ``new_folder`` may replace at ``--out``: ``files`` with ``--force``, nothing without.

    Raises:
        FileExistsError: the folder cannot be made.
    """
    replace: bool | frozenset[str] = files if force else False
    if (reason := refusal(out, replace)) is not None:
        hint = (
            "" if force or not out.is_dir() else "; --force replaces what this command wrote, or choose another folder"
        )
        raise FileExistsError(f"--out {out} {reason}{hint}")
    return replace


def check_out_file(out: Path, force: bool, option: str = "out") -> None:
    """Raises FileExistsError where the file ``--out`` cannot be written, or is there and ``--force`` is not."""
    if (reason := file_refusal(out, force)) is not None:
        hint = "; --force replaces it, or choose another file" if out.is_file() and not force else ""
        raise FileExistsError(f"--{option} {out} {reason}{hint}")
