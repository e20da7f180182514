"""``nk.accelerate_``: torch's norms become normkit's, and take in the additions and activations that follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn, optim

from normkit import fusion
from normkit.norm import Norm
from normkit.surgery import observe, recast
from normkit.surgery.operate import Plan, operate
from normkit.surgery.shortcut import Program, Shortcut, Shorten, has_hooks, program
from normkit.surgery.trace import Refused, Traced, trace
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

Filter = Callable[[nn.Module, str], bool]
_Found = tuple[Traced, list[fusion.Pattern], list[fusion.Refusal]]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def accelerate_(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Make the norms of a model normkit's, and let them take in the additions and activations that follow. In place.

    Layers keep their identity: names, parameters (the same objects), buffers, hooks, modes, ``state_dict``. Where a
    module's forward adds a residual to a norm's output or activates it, and nobody else can see the difference, the
    three steps become one call; the module's class, children and code stay.

    Args:
        model: any module. A DistributedDataParallel wrapper is looked through.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model runs on it before and
            after, in evaluation and in training, and the greatest error is certified; everything is put back.
        filter_fn: ``(module, name) -> bool``: which layers and which forwards may be changed; default all.
        optimizer: may be given as to every operation; there is nothing to do for it, since all parameters stay.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was changed, skipped and refused, each with its reason. ``certificate.undo()`` takes it back.

    Raises:
        TypeError: a wrapper that cannot be looked through; the message says what to do.
        RuntimeError: the outputs on ``example_inputs`` moved by more than rounding; the model is as it was.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> certificate = nk.accelerate_(model, example_inputs=torch.randn(2, 3, 8, 8))
    >>> print(certificate.verdict)
    accelerate_: 1 x BatchNorm2d becomes normkit's, 1 x forward fused.

    What differs afterwards: a batch with NaN or infinity leaves the running statistics of normkit's layers alone.

    When not to use it: a model that will be handed to torch.compile as it is; use ``backend="normkit"`` there.
    """
    intended = plan(model, example_inputs=example_inputs, filter_fn=filter_fn)
    return operate(intended, example_inputs=example_inputs, dry_run=dry_run)


def plan(model: nn.Module, *, example_inputs: Any = None, filter_fn: Filter | None = None) -> Plan:
    """What :func:`accelerate_` would do. Nothing is changed."""
    model = unwrap(model, "accelerate_")
    given = {} if example_inputs is None else observe.calls(model, example_inputs)
    wanted = filter_fn or (lambda module, name: True)
    intended = Plan("accelerate_", model)
    norms = _plan_recasts(intended, wanted)
    for name, module in model.named_modules():
        if _has_own_forward(module):
            _plan_shortcut(intended, norms, name, module, wanted, given.get(module))
    return intended


def _plan_recasts(intended: Plan, wanted: Filter) -> set[nn.Module]:
    """Plan normkit's class for every norm of torch; returns the norms that calls may be fused to."""
    norms: set[nn.Module] = set()
    twins = recast.twins()
    for name, module in intended.model.named_modules():
        if not isinstance(module, Norm) and not recast.looks_like_a_norm(module):
            continue
        if not wanted(module, name):
            intended.skip(name, "filter_fn left it out")
        elif reasons := recast.reasons_against(module):
            intended.skip(name, "; ".join(reasons))
            if isinstance(module, Norm) and module.activation is None and type(module) in twins.values():
                norms.add(module)
        else:
            action = f"{type(module).__name__} becomes normkit's"
            reason = "the same numbers in less memory traffic"
            intended.add(Prescription(action, name, reason), recast.Recast(module))
            norms.add(module)
    return norms


def _has_own_forward(module: nn.Module) -> bool:
    """A forward that somebody wrote to call other modules, or the chain of a Sequential."""
    kind = type(module)
    return kind is nn.Sequential or (kind.forward is not nn.Module.forward and not _is_a_layer(kind))


def _is_a_layer(kind: type[nn.Module]) -> bool:
    """Of torch or normkit. The models that normkit times and trains are written as anybody's are."""
    package, *within = kind.__module__.split(".")
    return package == "torch" or (package == "normkit" and within[:1] not in (["bench"], ["lab"]))


def _plan_shortcut(
    intended: Plan,
    norms: set[nn.Module],
    name: str,
    module: nn.Module,
    wanted: Filter,
    given: dict[str, Any] | None,
) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, Shortcut):
        intended.skip(name, "its forward is shortened already")
        return
    near = [child for child in _nearby(module) if child in norms]
    try:
        if forward is not None:
            raise Refused("has a forward that was replaced on the object")
        if not wanted(module, name):
            if any(isinstance(child, Norm) or recast.looks_like_a_norm(child) for child in _nearby(module)):
                intended.skip(name, "filter_fn left its forward out")
            return
        traced, patterns, refusals = _trace(module, norms, given)
        for refusal in refusals:
            intended.refuse(name, f"{_place(refusal.node)} is not fused: {refusal.reason}")
        if fused := [p for p in patterns if p.activation is not None or p.addition is not None or _functional(p.norm)]:
            words = ", ".join(_words(pattern) for pattern in fused)
            edit = Shorten(module, _program(module, traced, fused))
            reason = "one pass over memory instead of several"
            intended.add(Prescription("forward fused", name, reason, detail=words), edit)
    except Refused as refused:
        if near:  # of any other module there was nothing to gain
            intended.refuse(name, f"nothing is fused in {type(module).__name__}: its forward {refused}")


def _trace(module: nn.Module, norms: set[nn.Module], given: dict[str, Any] | None) -> _Found:
    """The graph of the module's forward, and what is in it.

    A Sequential that ends in a norm is taken apart if that norm then takes in what follows; all others stay calls.
    """
    inline: frozenset[str] = frozenset()
    while True:
        traced = trace(module, inline=inline, given=given)
        host = _Host(module, norms)
        more = {
            str(node.target)
            for node in traced.graph.nodes
            if node.op == "call_module" and _ends_in_a_norm(host.module_of(str(node.target)), norms)
            if fusion.follows(node, host)
        }
        if not more:
            break
        inline |= more
    patterns, refusals = fusion.find(traced.graph, host)
    gains = [str(pattern.norm.target) for pattern in patterns if pattern.last is not pattern.norm]
    needed = frozenset(name for name in inline if any(gain.startswith(f"{name}.") for gain in gains))
    if needed != inline:
        traced = trace(module, inline=needed, given=given)
        patterns, _ = fusion.find(traced.graph, host)  # the refusals are those of before: they name the reason
    return traced, patterns, refusals


def _ends_in_a_norm(module: nn.Module, norms: set[nn.Module]) -> bool:
    """Sequentials only: their end is known without running them, and they do nothing but call their children."""
    chain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    if not isinstance(module, nn.Sequential) or not chain or not len(module) or has_hooks(module):
        return False
    if not isinstance(vars(module).get("forward"), Shortcut | None):
        return False
    last = module[-1]
    return last in norms or _ends_in_a_norm(last, norms)


@dataclass
class _Host:
    """What is known about the graph of one module."""

    root: nn.Module
    norms: set[nn.Module] = field(repr=False)

    def module_of(self, target: str) -> nn.Module:
        return self.root.get_submodule(target)

    def is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            plain = len(node.args) == 1 and not node.kwargs
            return plain and self.module_of(str(node.target)) in self.norms
        # A functional batch norm is told the mode by the module, and such a module has been refused.
        return _functional(node)

    def may_add(self, norm: fx.Node, residual: fx.Node) -> bool:
        return True  # the call looks at the shapes when it runs

    def against(self, node: fx.Node) -> str | None:
        if node.op == "call_module" and has_hooks(self.module_of(str(node.target))):
            return f"{node.target} has hooks, which would see another value or none"
        return None


def _functional(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in fusion.FUNCTIONS


def _program(module: nn.Module, traced: Traced, patterns: list[fusion.Pattern]) -> Program:
    norms = tuple(dict.fromkeys(str(p.norm.target) for p in patterns if p.norm.op == "call_module"))
    for pattern in patterns:
        fusion.rewrite(traced.graph, pattern, shapes_known=False)
    parents = ["", *traced.inlined, *(name for name, child in module.named_modules() if isinstance(child, _CONTAINERS))]
    return program(
        traced.graph,
        parameters=traced.parameters,
        fixed=traced.fixed,
        facts=traced.facts,
        norms=norms,
        inlined=tuple((name, type(module.get_submodule(name))) for name in traced.inlined),
        counts=tuple((name, len(module.get_submodule(name)._modules)) for name in parents),
    )


def _nearby(module: nn.Module) -> Iterator[nn.Module]:
    """The children that the module's own forward calls: its own, and those in its lists and Sequentials."""
    for child in module.children():
        yield child
        if isinstance(child, (*_CONTAINERS, nn.Sequential)):
            yield from _nearby(child)


def _place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else str(node)


def _words(pattern: fusion.Pattern) -> str:
    return f"{_place(pattern.norm)} + {pattern.words}" if pattern.words else _place(pattern.norm)
