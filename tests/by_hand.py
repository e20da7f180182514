"""Norms of a few integers, worked out on paper: what the oracle itself is checked against.

All epsilons are 0, so that every mean, deviation and result is an integer or a plain fraction. Forward:
``mean``, deviations, variance and root are in the comment of each example. Backward, for one row of k values with
normalised values h, 1 / deviation r and g = upstream * weight:

    dx = r * (g - mean(g) - h * mean(g * h))        without centring:  dx = r * (g - h * mean(g * h))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, pi, sqrt
from typing import Any

from torch import nn

import normkit as nk

Numbers = list[Any]


@dataclass(frozen=True)
class Example:
    name: str
    layer: Callable[[], nn.Module]
    x: Numbers
    y: Numbers
    upstream: Numbers
    of_x: Numbers
    """Gradient of the input."""
    parameters: dict[str, Numbers] = field(default_factory=dict)
    gradients: dict[str, Numbers] = field(default_factory=dict)
    running: dict[str, Numbers] = field(default_factory=dict)
    """After the step; before it mean 0, variance 1."""
    residual: Numbers | None = None


EXAMPLES = (
    # Channel 0: 1, 3, 5, 7: mean 4, deviations -3 -1 1 3, variance 20/4 = 5. To have a plain root: 1, 1, 5, 5: mean 3,
    # deviations -2 -2 2 2, variance 4, root 2, h = -1 -1 1 1. Channel 1: 0, 6, 6, 0: mean 3, variance 9, root 3,
    # h = -1 1 1 -1. y = h * weight + bias with weight 2, 3 and bias 10, 0.
    # Upstream of channel 0: 4 0 0 0, g = 8 0 0 0, mean(g) = 2, mean(g h) = -2, dx = (g - 2 + 2 h) / 2 = 2 -2 0 0.
    # Upstream of channel 1: 1 1 0 0, g = 3 3 0 0, mean(g) = 3/2, mean(g h) = 0, dx = (g - 3/2) / 3 = 1/2 1/2 -1/2 -1/2.
    # Weight: sum(upstream h) = -4 and -1 + 1 = 0; bias: 4 and 2.
    # Running mean 0.5 * 0 + 0.5 * 3; unbiased variances 4 * 4/3 = 16/3 and 9 * 4/3 = 12: 0.5 + 8/3 and 0.5 + 6.
    Example(
        "batch_norm in training",
        lambda: nk.BatchNorm1d(2, eps=0.0, momentum=0.5),
        x=[[1, 0], [1, 6], [5, 6], [5, 0]],
        y=[[8, -3], [8, 3], [12, 3], [12, -3]],
        upstream=[[4, 1], [0, 1], [0, 0], [0, 0]],
        of_x=[[2, 0.5], [-2, 0.5], [0, -0.5], [0, -0.5]],
        parameters={"weight": [2, 3], "bias": [10, 0]},
        gradients={"weight": [-4, 0], "bias": [4, 2]},
        running={"running_mean": [1.5, 1.5], "running_var": [0.5 + 8 / 3, 6.5]},
    ),
    # By the running statistics as they are, mean 0 and variance 1: y = x * weight + bias, dx = upstream * weight.
    Example(
        "batch_norm in evaluation",
        lambda: nk.BatchNorm1d(2, eps=0.0, momentum=0.5).eval(),
        x=[[1, 0], [5, 6]],
        y=[[12, 0], [20, 18]],
        upstream=[[4, 1], [0, 1]],
        of_x=[[8, 3], [0, 3]],
        parameters={"weight": [2, 3], "bias": [10, 0]},
        gradients={"weight": [4, 6], "bias": [4, 2]},
        running={"running_mean": [0, 0], "running_var": [1, 1]},
    ),
    # Row 0: 2, 4, 2, 4: mean 3, variance 1, h = -1 1 -1 1. Row 1: 0, 0, 10, 10: mean 5, root 5, h = -1 -1 1 1.
    # Upstream 4 0 0 0 with weight 1 2 3 4, row 0: g = 4 0 0 0, mean(g) = 1, mean(g h) = -1, dx = g - 1 + h = 2 0 -2 0.
    # Row 1: upstream 0 0 0 5: g = 0 0 0 20, mean(g) = 5, mean(g h) = 5, dx = (g - 5 - 5 h) / 5 = 0 0 -2 2.
    Example(
        "layer_norm",
        lambda: nk.LayerNorm(4, eps=0.0),
        x=[[2, 4, 2, 4], [0, 0, 10, 10]],
        y=[[-1, 2, -3, 5], [-1, -2, 3, 5]],
        upstream=[[4, 0, 0, 0], [0, 0, 0, 5]],
        of_x=[[2, 0, -2, 0], [0, 0, -2, 2]],
        parameters={"weight": [1, 2, 3, 4], "bias": [0, 0, 0, 1]},
        gradients={"weight": [-4, 0, 0, 5], "bias": [4, 0, 0, 5]},
    ),
    # The same rows as two channels-first positions: x is (1, 4, 2) with the rows above along the channels.
    Example(
        "layer_norm over channels",
        lambda: nk.LayerNorm(4, eps=0.0, channels_first=True),
        x=[[[2, 0], [4, 0], [2, 10], [4, 10]]],
        y=[[[-1, -1], [2, -2], [-3, 3], [5, 5]]],
        upstream=[[[4, 0], [0, 0], [0, 0], [0, 5]]],
        of_x=[[[2, 0], [0, 0], [-2, -2], [0, 2]]],
        parameters={"weight": [1, 2, 3, 4], "bias": [0, 0, 0, 1]},
        gradients={"weight": [-4, 0, 0, 5], "bias": [4, 0, 0, 5]},
    ),
    # Mean square (1 + 49) / 2 = 25, root 5, h = 1/5 7/5. Weight 5 10: y = 1 14. Upstream 5 0: g = 25 0,
    # mean(g h) = 5/2, dx = (g - 5/2 h) / 5 = (25 - 1/2) / 5, -(7/2) / 5 = 49/10, -7/10. Weight: 5 * 1/5 = 1 and 0.
    Example(
        "rms_norm",
        lambda: nk.RMSNorm(2, eps=0.0),
        x=[[1, 7]],
        y=[[1, 14]],
        upstream=[[5, 0]],
        of_x=[[4.9, -0.7]],
        parameters={"weight": [5, 10]},
        gradients={"weight": [1, 0]},
    ),
    # Two groups of two channels, two positions. Group 0: 1 3 3 1: mean 2, variance 1, h = -1 1 1 -1.
    # Group 1: 0 0 8 8: mean 4, root 4, h = -1 -1 1 1. Weight 1 2 3 4, bias 0.
    # Upstream only at channel 2, position 0: 4, g = 12 0 0 0, mean(g) = 3, mean(g h) = -3,
    # dx = (g - 3 + 3 h) / 4 = 6/4 -6/4 0 0. Weight: channel 2: 4 * -1.
    Example(
        "group_norm",
        lambda: nk.GroupNorm(2, 4, eps=0.0),
        x=[[[1, 3], [3, 1], [0, 0], [8, 8]]],
        y=[[[-1, 1], [2, -2], [-3, -3], [4, 4]]],
        upstream=[[[0, 0], [0, 0], [4, 0], [0, 0]]],
        of_x=[[[0, 0], [0, 0], [1.5, -1.5], [0, 0]]],
        parameters={"weight": [1, 2, 3, 4], "bias": [0, 0, 0, 0]},
        gradients={"weight": [0, 0, -4, 0], "bias": [0, 0, 4, 0]},
    ),
    # Two samples of one channel: 2 2 6 6 (mean 4, root 2) and 0 10 10 0 (mean 5, root 5); h = -1 -1 1 1 and -1 1 1 -1.
    # Upstream 4 0 0 0 in sample 0: mean(g) = 1, mean(g h) = -1, dx = (g - 1 + h) / 2 = 1 -1 0 0.
    # Running: means 4 and 5 average to 4.5, unbiased variances 4 * 4/3 and 25 * 4/3 to 58/3; each blended by half.
    Example(
        "instance_norm in training",
        lambda: nk.InstanceNorm1d(1, eps=0.0, momentum=0.5, affine=True, track_running_stats=True),
        x=[[[2, 2, 6, 6]], [[0, 10, 10, 0]]],
        y=[[[-1, -1, 1, 1]], [[-1, 1, 1, -1]]],
        upstream=[[[4, 0, 0, 0]], [[0, 0, 0, 0]]],
        of_x=[[[1, -1, 0, 0]], [[0, 0, 0, 0]]],
        parameters={"weight": [1], "bias": [0]},
        gradients={"weight": [-4], "bias": [4]},
        running={"running_mean": [2.25], "running_var": [0.5 + 29 / 3]},
    ),
    # 2, 4: mean 3, h = -1 1; plus the residual 3 -4: 2 -3; relu: 2 0. Upstream 5 7 passes at the first value alone:
    # g = 5 0, mean(g) = 5/2, mean(g h) = -5/2, dx = g - 5/2 + 5/2 h = 0 0; the residual receives 5 0.
    Example(
        "residual, then activation",
        lambda: nk.LayerNorm(2, eps=0.0, activation="relu"),
        x=[[2, 4]],
        residual=[[3, -4]],
        y=[[2, 0]],
        upstream=[[5, 7]],
        of_x=[[0, 0]],
        gradients={"weight": [-5, 0], "bias": [5, 0], "residual": [[5, 0]]},
    ),
    # tanh(ln(3) / 2) = (3 - 1) / (3 + 1) = 1/2, slope 1 - 1/4 = 3/4; with alpha = ln(3) / 2 the inputs are 0, 1, -1.
    # y = tanh * 4 + 1. dx = upstream * 4 * alpha * slope; weight: upstream * tanh.
    Example(
        "dyt",
        lambda: nk.DyT(3),
        x=[[0, 1, -1]],
        y=[[1, 3, -1]],
        upstream=[[1, 2, 0]],
        of_x=[[2 * log(3), 3 * log(3), 0]],
        parameters={"alpha": [log(3) / 2], "weight": [4, 4, 4], "bias": [1, 1, 1]},
        gradients={"weight": [0, 1, 0], "bias": [1, 2, 0], "alpha": [6]},
    ),
    # alpha x + shift = 2 x + 2 is 0, 0 and so large that erf is 1. The slope of erf at 0 is 2 / sqrt(pi), far off 0.
    # dx = upstream * 4 * 2 * slope; alpha: the sum of upstream * 4 * slope * x = (-4 - 8) slope; shift: (4 + 8) slope.
    Example(
        "derf",
        lambda: nk.Derf(3),
        x=[[-1, -1, 100]],
        y=[[1, 1, 5]],
        upstream=[[1, 2, 3]],
        of_x=[[16 / sqrt(pi), 32 / sqrt(pi), 0]],
        parameters={"alpha": [2], "shift": [2], "weight": [4, 4, 4], "bias": [1, 1, 1]},
        gradients={"weight": [0, 0, 3], "bias": [1, 2, 3], "alpha": [-24 / sqrt(pi)], "shift": [24 / sqrt(pi)]},
    ),
    # Mean square (1 + 49) / 2 = 25, root 5, h = 1/5 7/5; weight 5, bias 1. g = 25 0, mean(g h) = 5/2,
    # dx = (g - 5/2 h) / 5 = 49/10, -7/10. Weight: 5 * 1/5; bias: 5.
    Example(
        "filter_response_norm",
        lambda: nk.FilterResponseNorm(1, eps=0.0),
        x=[[[1, 7]]],
        y=[[[2, 8]]],
        upstream=[[[5, 0]]],
        of_x=[[[4.9, -0.7]]],
        parameters={"weight": [5], "bias": [1]},
        gradients={"weight": [1], "bias": [5]},
    ),
    # The same numbers as two samples of one channel: the mean square is that of the batch.
    # Running: 0.5 * 1 + 0.5 * 25.
    Example(
        "power_norm while it is warming up",
        lambda: nk.PowerNorm(1, eps=0.0, decay=0.5),
        x=[[1], [7]],
        y=[[2], [8]],
        upstream=[[5], [0]],
        of_x=[[4.9], [-0.7]],
        parameters={"weight": [5], "bias": [1]},
        gradients={"weight": [1], "bias": [5]},
        running={"running_square": [13], "nu": [0]},
    ),
    # Warm: by 4, the running square, h = 1/2 7/2. g = 25 0. nu = 2 before: dx = (g - 0.5 * 2 h) / 5, the batch's root:
    # (25 - 1/2) / 5, -(7/2) / 5. nu moves by mean(g h) - 0.5 * 2 mean(h h) = 25/4 - 25/4 = 0, running to (4 + 25) / 2.
    Example(
        "power_norm when it is warm",
        lambda: nk.PowerNorm(1, eps=0.0, decay=0.5, warmup=0),
        x=[[1], [7]],
        y=[[3.5], [18.5]],
        upstream=[[5], [0]],
        of_x=[[4.9], [-0.7]],
        parameters={"weight": [5], "bias": [1], "running_square": [4], "nu": [2]},
        gradients={"weight": [2.5], "bias": [5]},
        running={"running_square": [14.5], "nu": [2]},
    ),
    # Sizes 5 and 15, mean 10, shares 1/2 and 3/2. Channel 0: x/2 * 2 + x = 6 8; channel 1: 15 * 3/2 * 4 + 15 = 105.
    # Upstream only at the 3: share 0 receives 2 * 3 = 6, so size 0 receives 6/10 - 6 * 5/100 / 2 = 0.45 and size 1
    # -0.15; each size spreads by x / size: 3/5 4/5 and 0 1. At the 3 itself come 1 + 2 * 1/2. Weight: 3 * 1/2.
    Example(
        "global_response_norm",
        lambda: nk.GlobalResponseNorm(2, eps=0.0),
        x=[[[3, 4], [0, 15]]],
        y=[[[6, 8], [0, 105]]],
        upstream=[[[1, 0], [0, 0]]],
        of_x=[[[2.27, 0.36], [0, -0.15]]],
        parameters={"weight": [2, 4]},
        gradients={"weight": [1.5, 0], "bias": [1, 0]},
    ),
    # v = 0: the swish is x / 2, and its slope 1/2. Mean 4, deviation 2: y = 1/2 3/2, times 2, plus 1.
    # L = 4 * 2 * x0 / (2 dev) = 4 x0 / dev; dev moves by (x - 4) / (2 dev) = -1/2 1/2:
    # dx = 4/2 - 4 * 2/4 * -1/2 = 3, and -2 * 1/2 = -1. v: 4 * 2 * 2 * 2 / 4 (slope of the sigmoid at 0) / 2 = 4.
    Example(
        "evonorm_s0",
        lambda: nk.EvoNormS0(1, eps=0.0),
        x=[[[2, 6]]],
        y=[[[2, 4]]],
        upstream=[[[4, 0]]],
        of_x=[[[3, -1]]],
        parameters={"v": [0], "weight": [2], "bias": [1]},
        gradients={"weight": [2], "bias": [4], "v": [4]},
    ),
    # One sample: both deviations are 2, and with v = 1 the lines x + 2 = 4 8 are above. y = 2/4, 6/8.
    # L = 16 x0 / (x0 + dev), dev moves by -1/2 1/2: dx = 16/4 - 16 * 2/16 * (1 - 1/2) = 3, and -2 * 1/2 = -1.
    # v: -16 * 2/16 * 2. Running: mean 0.5 * 4, unbiased variance 8: 0.5 + 4.
    Example(
        "evonorm_b0 in training",
        lambda: nk.EvoNormB0(1, eps=0.0, momentum=0.5),
        x=[[[2, 6]]],
        y=[[[0.5, 0.75]]],
        upstream=[[[16, 0]]],
        of_x=[[[3, -1]]],
        gradients={"weight": [8], "bias": [16], "v": [-4]},
        running={"running_mean": [2], "running_var": [4.5]},
    ),
    # One channel, no space: instance and layer have mean x and variance 0, the batch 2 and 1. Parts of the means
    # 1/4 1/4 1/2: mean = x/2 + 1, x - mean = -1/2 1/2. Parts of the variances 3/8 3/8 1/4: deviation 1/2. y = -1 1.
    # y0 = -p / sqrt(q) with the batch's parts p, q, whatever x is (dx = 0): dy0/dp = -2, dy0/dq = p / (2 q^1.5) = 2.
    # Softmax: dp = -1/8 -1/8 1/4 and dq = -3/32 -3/32 3/16 along the logits; upstream 4.
    Example(
        "switchable_norm in training",
        lambda: nk.SwitchableNorm(1, eps=0.0, momentum=0.5),
        x=[[1], [3]],
        y=[[-1], [1]],
        upstream=[[4], [0]],
        of_x=[[0], [0]],
        parameters={"mean_logits": [log(0.5), log(0.5), 0], "var_logits": [log(1.5), log(1.5), 0]},
        gradients={"weight": [-4], "bias": [4], "mean_logits": [1, 1, -2], "var_logits": [-0.75, -0.75, 1.5]},
        running={"running_mean": [1], "running_var": [1.5]},
    ),
    Example(
        "identity",
        lambda: nk.Identity(activation="relu"),
        x=[[-1, 2]],
        residual=[[3, -7]],
        y=[[2, 0]],
        upstream=[[5, 7]],
        of_x=[[5, 0]],
        gradients={"residual": [[5, 0]]},
    ),
)
