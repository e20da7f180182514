"""Facts that stand in a model: which norms it has, how they are set, and what its optimizer does with them. No data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit.integrations.exported_program import EXPORTED
from normkit.norm import Norm
from normkit.statistics import Running, Synchronized
from normkit.surgery.recast import is_called_a_norm
from normkit.vocabulary.quantity import Quantity
from normkit.vocabulary.reading import Reading

YES, NO = 1.0, 0.0
FLAG = "1: yes, 0: no"

BATCH, INSTANCE, GROUP, LAYER, RMS = "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"
_TORCH: tuple[tuple[Any, str], ...] = (
    (nn.modules.batchnorm._BatchNorm, BATCH),
    (nn.modules.instancenorm._InstanceNorm, INSTANCE),
    (nn.GroupNorm, GROUP),
    (nn.LayerNorm, LAYER),
    (nn.RMSNorm, RMS),
)


def _quantity(name: str, formula: str, unit: str = "", per: Any = "module") -> Quantity:
    return Quantity(name, "model", unit, formula, per=per)


QUANTITIES = (
    _quantity("kind", "name of the norm: batch_norm, layer_norm ...; the class of one that somebody else has written"),
    _quantity("class_name", "module and class of a norm"),
    _quantity("channels", "channels (features) of a norm", "channels"),
    _quantity("groups", "groups of a group norm", "groups"),
    _quantity("eps", "the number that is added to the variance", "variance"),
    _quantity(
        "momentum", "share of a batch in the running statistics; the word average: of all batches alike", "share"
    ),
    _quantity("in_training", "whether the layer is in training mode", FLAG),
    _quantity("keeps_statistics", "whether a batch norm has running statistics", FLAG),
    _quantity("frozen", "whether it normalises by running statistics in training too, as after nk.freeze_", FLAG),
    _quantity("affine_frozen", "whether weight and bias are there and none of them gets gradients", FLAG),
    _quantity("batches_seen", "how many batches the running statistics have seen: num_batches_tracked", "batches"),
    _quantity("statistics_dtype", "type of the running statistics"),
    _quantity("parameter_dtype", "type of weight and bias"),
    _quantity("statistics_at_start", "whether every running mean is 0 and every running variance 1", FLAG),
    _quantity("start_share", "what is left of the 0 and 1 of the start: (1 - momentum)^batches_seen", "share"),
    _quantity("accumulates", "whether running statistics move once for all batches of a step", FLAG),
    _quantity("least_running_variance", "min over channels of the running variance", "variance"),
    _quantity("synchronized", "whether a batch norm pools the batches of all processes", FLAG),
    _quantity("device", "type of the device of a norm"),
    _quantity("leftover_activation", "a child named activation of a layer whose forward never calls it"),
    _quantity("parameter_nonfinite", "values of a parameter that are NaN or infinite", "values", "parameter"),
    _quantity("norm_parameter_decay", "weight decay on a parameter of a norm", "1 / step", "parameter"),
    _quantity(
        "missing_in_optimizer", "parameters that get gradients and that the optimizer does not have", per="model"
    ),
    _quantity(
        "strange_in_optimizer", "parameters of the optimizer that the model does not have", "parameters", "model"
    ),
    _quantity("processes", "processes of torch.distributed; 0: it is not initialised", "processes", "model"),
    _quantity("model_training", "whether the model is in training mode", FLAG, "model"),
    _quantity("exported", "whether it is a program of torch.export, whose modes are fixed", FLAG, "model"),
)


OF_OPTIMIZER = ("norm_parameter_decay", "missing_in_optimizer", "strange_in_optimizer")
"""What only an optimizer tells."""


def kind_of(module: nn.Module) -> str:
    """The name of the norm that a module is, or the class of one that is called a norm; empty: it is none."""
    if isinstance(module, Norm):
        return type(module).spec.name
    for cls, name in _TORCH:
        if isinstance(module, cls):
            return name
    alone = next(module.children(), None) is None
    return type(module).__name__ if alone and is_called_a_norm(module) else ""


def norms_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and kind of every norm, once."""
    for name, module in model.named_modules():
        if kind := kind_of(module):
            yield name, module, kind


def read_structure(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Reading]:
    """Everything that can be read off without running the model."""
    units = {quantity.name: quantity.unit for quantity in QUANTITIES}
    facts = [*_of_model(model), *_of_parameters(model)]
    for name, module, kind in norms_in(model):
        facts += [(quantity, value, name) for quantity, value in _of_norm(module, kind)]
    for name, module in model.named_modules():
        if left := _leftover_activation(module):
            facts.append(("leftover_activation", left, name))
    if optimizer is not None:
        facts += _of_optimizer(model, optimizer)
    return [Reading(quantity, value, name, unit=units[quantity]) for quantity, value, name in facts]


Fact = tuple[str, Any, str]


def _of_model(model: nn.Module) -> Iterator[Fact]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    yield "processes", float(torch.distributed.get_world_size()) if distributed else 0.0, ""
    yield "model_training", float(model.training), ""
    yield "exported", float(EXPORTED in (getattr(model, "meta", None) or {})), ""


def _of_parameters(model: nn.Module) -> Iterator[Fact]:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            continue
        bad = int((~parameter.detach().isfinite()).sum()) if parameter.is_floating_point() else 0
        if bad:
            yield "parameter_nonfinite", float(bad), name


def _of_norm(module: nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    yield "kind", kind
    yield "class_name", f"{type(module).__module__}.{type(module).__qualname__}"
    yield "in_training", float(module.training)
    channels = next((n for n in (getattr(module, key, None) for key in _CHANNELS) if isinstance(n, int)), None)
    if channels is not None:
        yield "channels", float(channels)
    if isinstance(groups := getattr(module, "num_groups", None), int):
        yield "groups", float(groups)
    if isinstance(eps := getattr(module, "eps", None), float):
        yield "eps", eps
    own = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
    if own:
        yield "affine_frozen", float(not any(p.requires_grad for p in own))
        yield "parameter_dtype", _type(own[0])
        yield "device", own[0].device.type
    if isinstance(module, nn.modules.batchnorm._NormBase):
        yield from _of_running_statistics(module)


_CHANNELS = ("num_features", "num_channels")


def _of_running_statistics(module: nn.modules.batchnorm._NormBase) -> Iterator[tuple[str, Any]]:
    policy = getattr(module, "statistics", None)
    yield "synchronized", float(isinstance(module, nn.SyncBatchNorm) or isinstance(policy, Synchronized))
    yield "frozen", float(bool(getattr(module, "frozen", False)) or isinstance(policy, Running))
    yield "accumulates", float(getattr(getattr(module, "hold", None), "pending", None) is not None)
    yield "momentum", "average" if module.momentum is None else float(module.momentum)
    mean, var, seen = module.running_mean, module.running_var, module.num_batches_tracked
    yield "keeps_statistics", float(mean is not None and var is not None)
    if isinstance(mean, Tensor) and isinstance(var, Tensor) and not is_lazy(mean):
        yield "statistics_dtype", _type(mean)
        if var.numel() and not var.is_meta:
            yield "least_running_variance", float(var.detach().min())
            yield "statistics_at_start", float(bool((mean == 0).all()) and bool((var == 1).all()))
    if isinstance(seen, Tensor) and not is_lazy(seen) and not seen.is_meta:
        yield "batches_seen", float(seen)
        if seen > 0 and module.momentum is not None:
            yield "start_share", (1 - module.momentum) ** int(seen)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _leftover_activation(module: nn.Module) -> str:
    """What tools that know torch's layers alone leave of a layer with an activation: a child that nobody calls."""
    child = module._modules.get("activation")
    torchs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, Norm)
    return type(child).__name__ if child is not None and torchs and kind_of(module) else ""


def _of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Fact]:
    decays = {
        id(p): float(group.get("weight_decay") or 0.0) for group in optimizer.param_groups for p in group["params"]
    }
    ours = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module, _ in norms_in(model):
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) in decays:
                yield "norm_parameter_decay", decays[id(parameter)], f"{name}.{own}" if name else own
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in decays]
    yield "missing_in_optimizer", tuple(missing), ""
    yield "strange_in_optimizer", float(sum(key not in ours for key in decays)), ""
