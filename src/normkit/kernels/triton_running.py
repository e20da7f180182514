"""Running statistics on a GPU: they move to what is proposed, if that is finite, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def settle(mean, var, new_mean, new_var, tracked, skipped, c, BLOCK: tl.constexpr):
    """One program. A batch with a NaN or an infinity has a variance that is not finite; it is counted as skipped."""
    at = tl.arange(0, BLOCK)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, c, BLOCK):
        proposed = tl.load(new_var + first + at, first + at < c, other=0.0)
        wrong += (proposed - proposed != 0).to(tl.int32)
    total = tl.sum(wrong)
    for first in range(0, c, BLOCK):
        moves = (first + at < c) & (total + tl.zeros([BLOCK], tl.int32) == 0)
        tl.store(mean + first + at, tl.load(new_mean + first + at, moves), moves)
        tl.store(var + first + at, tl.load(new_var + first + at, moves), moves)
    if tracked is not None:
        tl.store(tracked, tl.load(tracked) + tl.where(total == 0, 1, 0))
    if skipped is not None:
        tl.store(skipped, tl.load(skipped) + tl.where(total == 0, 0, 1))
