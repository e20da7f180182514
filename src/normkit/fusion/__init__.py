"""Norm, then perhaps a residual addition, then perhaps an activation: one normkit call. One pass on fx graphs.

``nk.accelerate_`` hands it graphs of single modules, ``torch.compile(backend="normkit")`` the graphs of Dynamo. The two
differ in what they know (:class:`~normkit.fusion.match.Host`) and in what they write in the place of a pattern
(:mod:`~normkit.fusion.rewrite`); what counts as the same computation is decided here, once.
"""

from normkit.fusion.match import Host, Pattern, Refusal, find, follows
from normkit.fusion.rewrite import FUNCTIONS, rewrite

__all__ = ["FUNCTIONS", "Host", "Pattern", "Refusal", "find", "follows", "rewrite"]
