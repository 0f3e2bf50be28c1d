"""``vpfast doctor``: what is installed, what was built and why, and which backend serves each operator."""

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vpfast import ops
from vpfast._version import __version__
from vpfast.cli import Parser
from vpfast.ops import _backend, _gpu, _native
from vpfast.ops._backend import BackendError, Backends

DESCRIPTION = "Show what is installed, what was built and why, and which backend serves each operator."
BACKENDS = ("native", "triton", "reference")


def run(argv: Sequence[str]) -> int:
    """Print the report; always 0, for a missing extension is a finding and not a failure."""
    Parser(prog="vpfast doctor", description=DESCRIPTION, allow_abbrev=False).parse_args(argv)
    print("\n".join(report()))
    return 0


def report() -> Iterator[str]:
    """The lines of the report, section by section."""
    yield from _section("vpfast", _versions())
    yield from _section("build", _build())
    yield from _section("processor", _processor())
    yield from _section("triton", _triton())
    yield from _section("gpu", _gpus())
    for name in operators():
        yield from _section(name, _operator(name))
    yield from _section("extras", _extras())


def operators() -> list[str]:
    """The names of the operators, which are also the names of their rooms."""
    return [name for name in ops.__all__ if _room(name) is not None]


def _room(name: str) -> Backends | None:
    try:
        module = importlib.import_module(f"vpfast.ops.{name}.register")
    except ModuleNotFoundError:
        return None
    found: Backends = module.backends
    return found


def _section(title: str, lines: Iterator[tuple[str, object]]) -> Iterator[str]:
    yield title
    for key, value in lines:
        yield f"  {key:<20} {value}"
    yield ""


def _versions() -> Iterator[tuple[str, object]]:
    yield "vpfast", f"{__version__} in {os.path.dirname(os.path.dirname(__file__))}"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    yield (
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'not included'}",
    )
    yield "platform", platform.platform()


def _build() -> Iterator[tuple[str, object]]:
    record = dict(_native.build_record())
    for key in ("built", "requested", "reason"):
        yield key, record.pop(key, "unknown")
    for key, value in record.items():
        if value:
            yield key, value
    if _native.extension is None:
        yield "extension", f"none: {_native.why_missing()}"
        return
    yield "extension", getattr(_native.extension, "__file__", "loaded")
    for key, value in _ask("build_info", {}).items():
        yield key, value or "none"


def _processor() -> Iterator[tuple[str, object]]:
    yield "machine", f"{platform.machine()}, {os.cpu_count()} logical cores"
    yield "torch uses", torch.backends.cpu.get_cpu_capability()
    features = _ask("cpu_features", {})
    if features:
        for found, key in ((True, "features"), (False, "features absent")):
            yield key, ", ".join(name for name, present in features.items() if present == found) or "none"
    isa = _ask("isa", None)
    if isa is not None:
        yield "kernels use", isa


def _ask(name: str, otherwise: Any) -> Any:
    """What a function of the extension says; an extension of another age may lack it."""
    function = getattr(_native.extension, name, None)
    return otherwise if function is None else function()


def _triton() -> Iterator[tuple[str, object]]:
    try:
        yield "version", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found = "of no known version" if _backend._HAS_TRITON else "none: pip install triton; a CUDA torch brings it"
        yield "version", found
    yield "interpreter", "on (TRITON_INTERPRET=1): CPU tensors alone, slowly" if _backend._INTERPRETED else "off"


def _gpus() -> Iterator[tuple[str, object]]:
    if not torch.cuda.is_available():
        yield "devices", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"
        compiled_for = ", ".join(_gpu.built_for()) or "no GPU"
        runs = "runs" if _gpu.runs_native(index) else "does not run"
        yield "", f"compiled code (for {compiled_for}) {runs} there"
        yield "", f"Triton {'can' if _gpu.runs_triton(index) else 'cannot'} compile for it"
    if _gpu.built_for():
        compiled, known = _gpu.cuda_versions()
        yield "driver", f"knows CUDA {known}; compiled code is of CUDA {compiled}"
    yield "kernel probe", _ask("cuda_probe", "no compiled extension")


def _devices() -> Iterator[tuple[str, str]]:
    """Devices to ask the operators about, each with what is to be added to the answer."""
    yield "cpu", ""
    if not torch.cuda.is_available():
        yield "cuda", ", if a GPU were here"
        return
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}", ""


def _operator(name: str) -> Iterator[tuple[str, object]]:
    backends = _room(name)
    assert backends is not None
    for device, note in _devices():
        try:
            chosen = backends.select(device) + note
        except BackendError:
            chosen = "none: an error"
        yield f"on {device}", chosen
        for other in BACKENDS:
            refusal = backends.refusal(other, device)
            if refusal is not None:
                yield "", f"not {other}: {refusal}"


def _extras() -> Iterator[tuple[str, object]]:
    for extra, packages in sorted(_required().items()):
        missing = [package for package in packages if not _installed(package)]
        if missing:
            yield extra, f"lacks {', '.join(missing)}: pip install 'vpfast[{extra}]'"
        else:
            yield extra, "complete"
    if not _required():
        yield "", "unknown: vpfast runs from a folder and is not installed"


def _required() -> dict[str, list[str]]:
    """The packages of each extra, as the installed metadata lists them."""
    try:
        lines = importlib.metadata.requires("vpfast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    packages: dict[str, list[str]] = {}
    for line in lines:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and name[0] not in ("vpfast", *packages.get(extra[1], ())):
            packages.setdefault(extra[1], []).append(name[0])
    return packages


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
