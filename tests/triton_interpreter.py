"""A pytest plugin for processes with ``TRITON_INTERPRET=1``: ``-p triton_interpreter``.

The interpreter replaces Triton's language anew at every call of one function by another, eleven milliseconds each; once
per module is enough. What it computes stays the same.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_replaced: set[int] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if id(self.fn.__globals__) not in _replaced:
        _replaced.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
