"""Drift: how far what a layer sees is from what its running statistics say."""

from __future__ import annotations

from typing import Any

from torch import nn

from normkit.moments import Moments
from normkit.surgery.batches import Feed
from normkit.surgery.collect import moments_of


def drifts(model: nn.Module, layers: dict[str, Any], feed: Feed) -> dict[str, float]:
    """By layer, on the batches that were kept, in evaluation: how far what it sees is from what it assumes."""
    seen: dict[str, Moments] = {}

    def watch(name: str) -> Any:
        def note(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            now = moments_of(layer, args, kwargs)
            seen[name] = seen[name].merge(now) if name in seen else now

        return note

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for batch in feed.held:
            feed.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _distance(moments, layers[name]) for name, moments in seen.items()}


def _distance(seen: Moments, layer: Any) -> float:
    var = layer.running_var.double() + layer.eps
    mean = (seen.mean.double() - layer.running_mean.double()) / var.sqrt()
    deviation = ((seen.var().double() + layer.eps) / var).sqrt()
    return (mean.square() + (deviation - 1).square()).mean().sqrt().item()
