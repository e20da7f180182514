"""Neighbours: what stands before and after each norm, and what that does to it on a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normkit.measure.flow import Flow, Step, read_code, read_pass
from normkit.measure.sites import is_activation
from normkit.measure.structure import BATCH, FLAG, GROUP, INSTANCE, kind_of
from normkit.measure.untouched import copied, in_mode, original, untouched
from normkit.surgery import batches
from normkit.vocabulary.quantity import Quantity
from normkit.vocabulary.reading import Reading

GRAPH = (
    Quantity(
        "bias_before", "model", "", "the weight layer with a bias whose output only this batch or instance norm reads"
    ),
    Quantity("foldable_into", "model", "", "the weight layer whose output only this batch norm reads"),
    Quantity("activation_before", "model", "", "the activation module whose output the norm reads"),
    Quantity(
        "dropout_before", "model", "", "the nearest dropout between the batch norm before (or the input) and this one"
    ),
    Quantity("ends_branch", "model", FLAG, "whether the norm is the last layer of a residual branch"),
    Quantity("calls", "model", "calls", "how often the norm is called in one forward pass"),
    Quantity("skips", "model", "additions", "additions of two tensors that the model computes", per="model"),
)
"""Read from the code of a model where that can be followed, and from a forward pass otherwise."""
ON_BATCH = (
    Quantity(
        "features_last_before", "batch", "", "what hands (n, length, features) to a norm whose channels are axis 1"
    ),
    Quantity(
        "call_gap",
        "batch",
        "deviations",
        "between two calls of a batch norm: mean over channels of |mean - mean'| / std",
        means="How different the inputs are on which one shared batch norm is called.",
    ),
    Quantity(
        "padding_share",
        "batch",
        "share",
        "positions at the end of a sample that equal its last one / positions, of samples that differ in their number",
        means="Positions that only repeat the end of a sample: padding that enters the statistics.",
    ),
    Quantity(
        "attention_logit",
        "batch",
        "nats",
        "max over q k / sqrt(d), before the softmax",
        "arXiv:2309.14322",
        means="The greatest value that goes into a softmax of attention.",
    ),
    Quantity(
        "dropout_variance_shift",
        "batch",
        "nats",
        "|mean over channels of log(var with dropout / var without)| of what the norm reads",
        "Li et al. 2019, arXiv:1801.05134",
        means="How much dropout changes the variance that a batch norm reads in training.",
    ),
)
QUANTITIES = (*GRAPH, *ON_BATCH)
_UNITS = {quantity.name: quantity.unit for quantity in QUANTITIES}

_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase)
_ELEMENTWISE = ("add", "mul", "relu", "gelu", "silu", "tanh", "sigmoid", "native_dropout", "div", "sub")
_ADDITIONS = ("add", "add_", "iadd")

Fact = tuple[str, Any, str]


def read_neighbours(
    model: nn.Module, batch: Any = None, call: batches.Call | None = None
) -> tuple[list[Reading], bool]:
    """What is known of the neighbours of norms, and whether the model could be followed at all.

    Args:
        model: left as it was.
        batch: as :func:`normkit.measure.measure` takes it; ``None``: the code alone is read.
        call: ``(model, batch)`` runs the model.
    """
    model = original(model)
    if batch is None:
        flow = read_code(model)
        facts = [] if flow is None else [*of_graph(flow)]
    else:
        with untouched(model), in_mode(model, None), torch.no_grad():
            facts = [*_of_pass(model, lambda: (call or batches.call)(model, copied(batch)))]
        if shifted := [name for quantity, _, name in facts if quantity == "dropout_before"]:
            facts += _variance_shift(model, lambda: (call or batches.call)(model, copied(batch)), shifted)
        flow = Flow([])
    return [Reading(quantity, value, name, unit=_UNITS[quantity]) for quantity, value, name in facts], flow is not None


def of_graph(flow: Flow) -> Iterator[Fact]:
    """What the order of the steps alone says."""
    counts = Counter(step.name for _, step in flow.of_norms())
    done: set[str] = set()
    for place, step in flow.of_norms():
        if step.name in done:
            continue
        done.add(step.name)
        yield "calls", float(counts[step.name]), step.name
        if counts[step.name] == 1:
            yield from ((quantity, value, step.name) for quantity, value in _of_norm(flow, place, step))
    additions = [step for step in flow.steps if step.operator in _ADDITIONS and len(step.sources) > 1]
    yield "skips", float(len(additions)), ""


def _of_norm(flow: Flow, place: int, step: Step) -> Iterator[tuple[str, Any]]:
    kind = kind_of(step.module) if step.module is not None else ""
    if (before := flow.before(place)) is not None:
        producer = flow.steps[before]
        alone = flow.after(before) == [place]
        if isinstance(producer.module, _WEIGHTS) and alone and kind in (BATCH, INSTANCE):
            if producer.module.bias is not None:
                yield "bias_before", producer.name
            if kind == BATCH:
                yield "foldable_into", producer.name
        if producer.module is not None and is_activation(producer.module):
            yield "activation_before", producer.name
    if kind == BATCH:
        if dropout := _dropout(flow, place):
            yield "dropout_before", dropout
        yield "ends_branch", float(_ends_branch(flow, place))


def _dropout(flow: Flow, place: int) -> str:
    """The nearest dropout that works, upstream as far as the next batch norm."""
    waiting, looked_at = [*flow.steps[place].sources], set()
    while waiting:
        place = max(waiting)
        waiting.remove(place)
        step = flow.steps[place]
        if place in looked_at or (step.module is not None and kind_of(step.module) == BATCH):
            continue
        looked_at.add(place)
        if isinstance(step.module, _DROPOUTS) and step.module.p > 0:
            return step.name
        waiting += step.sources
    return ""


def _ends_branch(flow: Flow, place: int) -> bool:
    """Its output is added to something with fewer norms on the way back to where the two parted."""
    readers = flow.after(place)
    step = flow.steps[readers[0]] if len(readers) == 1 else None
    if step is None or step.operator not in _ADDITIONS or len(step.sources) != 2:
        return False
    ours, other = sorted(step.sources, key=lambda source: not _leads(flow, place, source))
    return _norms_back(flow, ours) > _norms_back(flow, other)


def _leads(flow: Flow, place: int, source: int) -> bool:
    """Whether ``source`` is the step at ``place``, or a view of what it makes."""
    return source == place or source in flow.readers[place]


def _norms_back(flow: Flow, place: int) -> int:
    """Norms on the way back to a step that several others read."""
    count = 0
    while True:
        step = flow.steps[place]
        count += bool(step.module is not None and kind_of(step.module))
        if not step.sources or (len(flow.readers[place]) > 1):
            return count
        place = step.sources[0]


class _Eyes:
    """What is noted of the tensors that come by, beside the flow."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.padding: dict[str, float] = {}
        self.logits: dict[str, float] = {}

    def __call__(self, where: str, operator: str, arguments: tuple) -> None:
        if not operator:
            self._layer(where, arguments)
        elif operator.startswith("_scaled_dot_product"):
            self._logit(where, _scores(*arguments[:2]))
        elif operator in ("_softmax", "_safe_softmax") and arguments[0].dim() > 2:
            self._logit(where, arguments[0])

    def _logit(self, where: str, scores: Tensor) -> None:
        if scores.numel():
            self.logits[where] = max(self.logits.get(where, 0.0), float(scores.amax()))

    def _layer(self, where: str, arguments: tuple) -> None:
        module, *inputs = arguments
        kind = kind_of(module)
        x = next((value for value in inputs if isinstance(value, Tensor)), None)
        if x is None or not x.is_floating_point() or kind not in (BATCH, INSTANCE, GROUP) or x.dim() < 2:
            return
        if kind == BATCH and x.numel() > x.shape[1]:
            var, mean = torch.var_mean(x.float(), [0, *range(2, x.dim())], correction=0)
            self.calls.setdefault(where, []).append((mean, var))
        if x.dim() == 3 and len(x) > 1:
            self.padding[where] = padding(x)


def padding(x: Tensor) -> float:
    """Share of positions that only repeat the last one of their sample, in (n, c, l) of samples of unequal length."""
    same = (x == x[..., -1:]).all(1)
    runs = same.flip(-1).cummin(-1).values.sum(-1)
    runs = torch.where(runs > 1, runs, 0)
    alike = bool((runs == runs[0]).all())  # samples of equal length: a border, or nothing at all
    return 0.0 if alike else float(runs.sum() / (x.shape[0] * x.shape[2]))


def _scores(query: Tensor, key: Tensor) -> Tensor:
    if query.dim() == 4 and key.shape[1] != query.shape[1]:  # several query heads share a key head
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query.float() @ key.float().transpose(-2, -1) / query.shape[-1] ** 0.5


def _of_pass(model: nn.Module, run: Callable[[], Any]) -> Iterator[Fact]:
    eyes = _Eyes()
    flow = read_pass(model, run, eyes)
    yield from of_graph(flow)
    for place, step in flow.of_norms(BATCH, INSTANCE):
        if len(step.shape) == 3 and (producer := _features_last(flow, flow.before(place), step.shape)):
            yield "features_last_before", producer, step.name
    for name, calls in eyes.calls.items():
        if len(calls) > 1:
            (mean, var), *others = calls
            gaps = [float(((mean - m).abs() / var.clamp_min(1e-12).sqrt()).mean()) for m, _ in others]
            yield "call_gap", max(gaps), name
    yield from (("padding_share", share, name) for name, share in eyes.padding.items())
    yield from (("attention_logit", logit, name) for name, logit in eyes.logits.items())


def _features_last(flow: Flow, place: int | None, shape: tuple[int, ...]) -> str:
    """The layer that computes features along the last axis, and between which and here nobody moves an axis."""
    while place is not None:
        step = flow.steps[place]
        if step.shape[-1:] != shape[-1:]:
            return ""
        if isinstance(step.module, _FEATURES_LAST):
            return step.name
        passes = isinstance(step.module, _DROPOUTS) or (step.module is not None and is_activation(step.module))
        if not passes and step.operator not in _ELEMENTWISE:
            return ""
        place = flow.before(place)
    return ""


def _variance_shift(model: nn.Module, run: Callable[[], Any], names: list[str]) -> Iterator[Fact]:
    """The variances of two passes in training, one of them without dropout."""
    found: list[dict[str, Tensor]] = []
    for dropping in (True, False):
        with untouched(model), in_mode(model, None), torch.no_grad():
            for module in model.modules():
                if isinstance(module, _DROPOUTS):
                    module.training = dropping
            found.append(_input_variances(model, run, names))
    for name in found[0].keys() & found[1].keys():
        with_dropout, without = (variances[name] for variances in found)
        alive = (with_dropout > 0) & (without > 0)
        if alive.any():
            yield "dropout_variance_shift", float((with_dropout / without)[alive].log().mean().abs()), name


def _input_variances(model: nn.Module, run: Callable[[], Any], names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            found[name] = args[0].float().var([0, *range(2, args[0].dim())], correction=0)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
