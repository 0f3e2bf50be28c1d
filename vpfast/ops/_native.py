"""The compiled extension, loaded once. A failure is kept and told later, by ``vpfast doctor`` and by ``native``."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


def _load() -> tuple[ModuleType | None, ImportError | None]:
    try:
        return importlib.import_module("vpfast._C"), None
    except ImportError as error:
        return None, error


extension, load_error = _load()


def build_record() -> dict[str, Any]:
    """What setup.py decided when this copy was built, and why: keys ``requested``, ``built``, ``reason``, ..."""
    path = Path(__file__).parents[1] / "_build.json"
    if not path.is_file():
        return {"requested": "unknown", "built": "none", "reason": "no build record: this copy was never built"}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def why_missing() -> str:
    """One sentence: why there is no compiled extension. Only meaningful when ``extension`` is None."""
    record = build_record()
    if record["built"] == "none":
        return f"the package was built without compiled kernels ({record['reason']})"
    return f"the compiled extension does not load ({load_error})"
