"""The way from a norm to the layer before it or to those behind it, and where the channels are along it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from normkit.surgery.folding import layers
from normkit.surgery.folding.flow import Flow, shape
from normkit.surgery.folding.layers import Use
from normkit.surgery.folding.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """Where the channels of a value are."""

    axis: int
    inner: int = 1
    """So many neighbours along the axis belong to one channel, as after ``flatten(1)`` of an image."""
    zeros: bool = False
    """Zeros have been put beside the value, which a shift has not reached."""


def ahead(site: Site, taken: Mapping[Node, Site]) -> Use | str:
    """The layer that makes what a norm normalises, if nobody else reads it; or what is in the way.

    ``taken``: norms, by their output, that the layer before takes in: they are gone when this one follows.
    """
    flow, axis = site.flow, site.axis
    if site.input is None:
        return "its statistics are those of the input"
    node, readers = site.input, site.inside
    while True:
        for reader in flow.readers(node):
            if reader not in readers:
                return f"{flow.words(reader)} reads the same value, from before the norm"
        if layers.is_layer(node):
            used = layers.use(flow, node)
            if isinstance(used, Use) and used.axis != axis:
                return f"{used.owner} has its channels along axis {used.axis}, the norm along axis {axis}"
            return used
        if node in taken and (before := taken[node]).input is not None:
            node, readers = before.input, before.inside
            continue
        place = _back(node, axis)
        if place is None:
            return f"{flow.words(node)} stands before it" if node.op != "placeholder" else "it normalises an input"
        source: Node = node.args[0]  # type: ignore[assignment]
        node, readers, axis = source, frozenset({node}), place


def behind(site: Site, taken: Mapping[Node, Site]) -> list[tuple[Use, int]] | str:
    """All layers that read what a norm makes, each with how many inputs belong to one channel; or what is in the way.

    ``taken``: norms, by the operator that applies them, that the layers behind take in.
    """
    found: list[tuple[Use, int]] = []
    reason = _collect(site, site.output, Place(site.axis), taken, found)
    return reason or found or "nothing reads what it makes"


def _collect(
    site: Site, node: Node, place: Place, taken: Mapping[Node, Site], found: list[tuple[Use, int]]
) -> str | None:
    flow = site.flow
    for reader in flow.readers(node):
        if reader.op == "output":
            return "the model returns what it makes" if not flow.prefix else f"{flow.prefix[:-1]} returns what it makes"
        if reader in taken:
            reason = _collect(site, taken[reader].output, place, taken, found)
        elif layers.is_layer(reader):
            used = _reading(flow, reader, node, place, site.constants.shifts)
            reason = used if isinstance(used, str) else found.append((used, place.inner))  # type: ignore[func-returns-value]
        elif (there := _through(reader, node, place)) is None:
            reason = f"{flow.words(reader)} reads what it makes"
        else:
            reason = _collect(site, reader, there, taken, found)
        if reason:
            return reason
    return None


def _reading(flow: Flow, reader: Node, node: Node, place: Place, shifts: bool) -> Use | str:
    if reader.args[0] is not node or node in reader.args[1:]:
        return f"{flow.words(reader)} uses what it makes as a weight"
    used = layers.use(flow, reader)
    if isinstance(used, str):
        return used
    axis = len(shape(node)) - 1 if used.kind == "linear" else used.axis
    if place.axis != axis or (place.inner > 1 and used.kind != "linear"):
        return f"{used.owner} has its channels along axis {axis}, the norm along axis {place.axis}"
    if shifts and (used.pads or place.zeros):
        return f"{used.owner} pads with zeros, which the norm has not shifted"
    if shifts and used.kind == "transposed":
        return f"{used.owner} is transposed: what a shift adds to its output depends on the place"
    return used


_SAME = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.roll.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.slice.Tensor,
)
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_SPATIAL = {
    f"{kind}_pool{dims}d": dims for kind in ("avg", "adaptive_avg") for dims in (1, 2, 3)
}  # the pools, and over how many of the last axes they go


def _through(node: Node, source: Node, place: Place) -> Place | None:
    """Where the channels are behind a node that treats them all alike; ``None``: it does something else."""
    if node.args[0] is not source or source in node.args[1:]:
        return None
    axis, dims = place.axis, len(shape(source))
    if node.target in _VIEWS:
        return _reshaped(shape(source), shape(node), place)
    if node.target in (aten.permute.default, aten.transpose.int):
        return replace(place, axis=_order(node, dims).index(axis))
    if node.target is aten.select.int:
        at = _positive(node.args[1], dims)
        return None if at == axis else replace(place, axis=axis - (at < axis))
    if node.target is aten.mean.dim:
        gone = {_positive(dim, dims) for dim in node.args[1] or range(dims)}  # type: ignore[union-attr]
        kept = len(node.args) > 2 and node.args[2]
        return None if axis in gone else replace(place, axis=axis - (0 if kept else sum(d < axis for d in gone)))
    if node.target not in _SAME or not _leaves_alone(node, axis, dims):
        return None
    return replace(place, zeros=place.zeros or _puts_zeros(node))


def _back(node: Node, axis: int) -> int | None:
    """Where the channels are before a node, if the norm could as well stand there."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, Node) or source in node.args[1:] or _puts_zeros(node):
        return None
    for before in range(len(shape(source))):
        there = _through(node, source, Place(before))
        if there is not None and there.axis == axis and there.inner == 1:
            return before
    return None


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], place: Place) -> Place | None:
    """The axis that counts the same thing: as many elements before it, and as long, or longer by whole channels."""
    before = math.prod(old[: place.axis])
    for axis, size in enumerate(new):
        if math.prod(new[:axis]) != before:
            continue
        if size == old[place.axis]:
            return replace(place, axis=axis)
        for end in range(place.axis + 2, len(old) + 1):
            if place.inner == 1 and size == math.prod(old[place.axis : end]):
                return replace(place, axis=axis, inner=math.prod(old[place.axis + 1 : end]))
    return None


def _order(node: Node, dims: int) -> list[int]:
    """Of a permutation: which axis of the input each axis of the output is."""
    if node.target is aten.permute.default:
        return [_positive(dim, dims) for dim in node.args[1]]  # type: ignore[union-attr]
    order = list(range(dims))
    first, second = (_positive(dim, dims) for dim in node.args[1:3])
    order[first], order[second] = second, first
    return order


def _leaves_alone(node: Node, axis: int, dims: int) -> bool:
    """Whether the node's own axes are others than that of the channels."""
    name = str(node.target).partition(".")[2].partition(".")[0]
    if name in _SPATIAL:
        return axis < dims - _SPATIAL[name] and (not name.startswith("avg") or _pool_counts_no_padding(node))
    if node.target in _PADS:
        amounts: list[int] = node.args[1]  # type: ignore[assignment]
        reach = [dims - 1 - place // 2 for place, amount in enumerate(amounts) if amount]
        return axis not in reach
    if node.target is aten.slice.Tensor:
        return _positive(node.args[1] if len(node.args) > 1 else 0, dims) != axis
    if node.target is aten.roll.default:
        return len(node.args) > 2 and axis not in [_positive(dim, dims) for dim in node.args[2]]  # type: ignore[union-attr]
    return True


def _pool_counts_no_padding(node: Node) -> bool:
    padding = node.args[3] if len(node.args) > 3 else 0
    return not any(padding if isinstance(padding, list | tuple) else [padding])


def _puts_zeros(node: Node) -> bool:
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else "constant"
        return mode == "constant" and any(node.args[1])  # type: ignore[arg-type]
    return node.target is aten.constant_pad_nd.default and any(node.args[1])  # type: ignore[arg-type]


def _positive(dim: object, dims: int) -> int:
    assert isinstance(dim, int)
    return dim % dims if dims else 0
