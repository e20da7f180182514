"""Strategies in anybody's training loop: readings -> strategy -> prescriptions -> surgery, between two steps."""

from normkit.loop.attached import Attached, attach, refuse_resumed

__all__ = ["Attached", "attach", "refuse_resumed"]
