"""What torch.compile and torch.export are told of functions that they meet."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_traces(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``: a trace calls ``function`` once and keeps what it returned.

    That one imports the whole compiler to set this mark, which takes every process a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
