"""What torch.compile, torch.export and others who look at operators are told, and whether they look."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_traces(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``: a trace calls ``function`` once and keeps what it returned.

    That one imports the whole compiler to set this mark, which takes every process a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_looked_at() -> bool:
    """Does somebody trace operators, or count what they do? He knows torch's."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._get_tracing_state() is not None
