"""An exported program (``torch.export``) as a model of layers: its operators become the layers that they came from."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
EXPORTED = "exported program"
"""Key in the ``meta`` of the model that :func:`layered` makes."""


def layered(program: Any) -> nn.Module:
    """The program as a module in which norms, activations, linear and convolutional layers are layers of torch again.

    A program of ``torch.export`` calls functions on tensors, and knows neither layers nor modes. What is made of it
    shares its parameters and buffers, has the names of the model it was exported from, computes the same, and says by
    ``training`` how each batch norm normalises in it. It takes other sizes than those it was exported with, as far as
    its code does. A module is handed back as it is.

    Args:
        program: a ``torch.export.ExportedProgram``.

    >>> import torch
    >>> from normkit.integrations.exported_program import layered
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
    >>> program = torch.export.export(model, (torch.zeros(2, 4),))
    >>> [type(layer).__name__ for layer in layered(program).children()]
    ['Linear', 'BatchNorm1d']
    """
    if isinstance(program, nn.Module):
        return program
    model = program.module(check_guards=False)
    model._forward_pre_hooks.clear()  # it compares sizes with those of the export
    model._forward_pre_hooks_with_kwargs.clear()
    for module in model.modules():
        module.training = False
    for node in list(model.graph.nodes):
        if node.op == "call_function" and node.target in _LAYERS:
            _become_a_layer(model, node)
    for node in reversed(model.graph.nodes):
        if not node.users and (node.op == "get_attr" or _counts_batches(node)):
            model.graph.erase_node(node)
    model.recompile()
    model.training = any(module.training for module in model.modules())
    model.meta[EXPORTED] = True
    return model


def _counts_batches(node: fx.Node) -> bool:
    """What batch norm does beside its operator, and the layer does by itself."""
    counted = node.args[0] if node.target is aten.add_.Tensor else None
    return isinstance(counted, fx.Node) and str(counted.target).endswith(".num_batches_tracked")


def _become_a_layer(model: fx.GraphModule, node: fx.Node) -> None:
    given = node.normalized_arguments(model, normalize_to_only_use_kwargs=True)
    if given is None:
        return
    owned = {key: arg for key, arg in given.kwargs.items() if isinstance(arg, fx.Node) and arg.op == "get_attr"}
    tensors = {key: attrgetter(str(arg.target))(model) for key, arg in owned.items()}
    x = given.kwargs.get("input", given.kwargs.get("self"))
    if not isinstance(x, fx.Node):
        return
    layer = _LAYERS[node.target]({**given.kwargs, **tensors}, tensors, x.meta["val"])
    if layer is None:
        return
    layer.training = layer.training and isinstance(layer, nn.modules.batchnorm._NormBase)
    for key, tensor in tensors.items():
        setattr(layer, key, tensor)
    name = _name(model, node, next(iter(owned.values()), None))
    there = dict(model.named_modules()).get(name)
    if there is None or type(there) is nn.Module:
        if there is not None and getattr(there, "num_batches_tracked", None) is not None:
            layer.num_batches_tracked = there.num_batches_tracked
        model.add_submodule(name, layer)
    elif repr(there) != repr(layer):  # the same weights in another way
        model.add_submodule(name := node.name, layer)
    with model.graph.inserting_before(node):
        node.replace_all_uses_with(called := model.graph.call_module(name, (x,)))
    called.meta = dict(node.meta)
    model.graph.erase_node(node)


def _name(model: fx.GraphModule, node: fx.Node, owned: fx.Node | None) -> str:
    """Of the layer that it was: by its parameters, or by where the operator was called."""
    if owned is not None and (owner := str(owned.target).rpartition(".")[0]):
        return owner
    place, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    return place if place and str(kind).startswith("torch.nn.modules.") else node.name


Given = dict[str, Any]
Make = Callable[[Given, dict[str, Tensor], Tensor], nn.Module | None]


def _batch_norm(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module:
    cls: Any = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(x.dim(), nn.BatchNorm1d)
    layer = cls(
        x.shape[1],
        given["eps"],
        given["momentum"],
        affine="weight" in tensors,
        track_running_stats="running_mean" in tensors,
        device="meta",
    )
    layer.training = bool(given["training"])
    return layer


def _instance_norm(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module:
    cls: Any = {4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(x.dim(), nn.InstanceNorm1d)
    tracks = "running_mean" in tensors
    layer = cls(x.shape[1], given["eps"], given["momentum"], "weight" in tensors, tracks, device="meta")
    layer.training = bool(given["use_input_stats"]) and tracks
    return layer


def _layer_norm(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module:
    shape = tuple(given["normalized_shape"])
    return nn.LayerNorm(shape, given["eps"], "weight" in tensors, "bias" in tensors, device="meta")


def _rms_norm(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module:
    return nn.RMSNorm(tuple(given["normalized_shape"]), given["eps"], "weight" in tensors, device="meta")


def _group_norm(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module:
    return nn.GroupNorm(given["num_groups"], x.shape[1], given["eps"], "weight" in tensors, device="meta")


def _linear(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module | None:
    weight = tensors.get("weight")
    if weight is None:
        return None
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")


def _convolution(cls: Any) -> Make:
    def make(given: Given, tensors: dict[str, Tensor], x: Tensor) -> nn.Module | None:
        weight = tensors.get("weight")
        if weight is None:
            return None
        sizes = {key: tuple(given[key]) for key in ("stride", "padding", "dilation")}
        groups, bias, kernel = given["groups"], "bias" in tensors, tuple(weight.shape[2:])
        return cls(weight.shape[1] * groups, weight.shape[0], kernel, groups=groups, bias=bias, **sizes, device="meta")

    return make


def _activation(cls: Any, *options: str) -> Make:
    return lambda given, tensors, x: cls(**{option: given[option] for option in options})


_LAYERS: dict[Any, Make] = {
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution(nn.Conv1d),
    aten.conv2d.default: _convolution(nn.Conv2d),
    aten.conv3d.default: _convolution(nn.Conv3d),
    aten.gelu.default: _activation(nn.GELU, "approximate"),
}
for _cls, *_operators in (
    (nn.ReLU, aten.relu.default, aten.relu_.default),
    (nn.SiLU, aten.silu.default, aten.silu_.default),
    (nn.Sigmoid, aten.sigmoid.default, aten.sigmoid_.default),
    (nn.Tanh, aten.tanh.default, aten.tanh_.default),
    (nn.Hardswish, aten.hardswish.default, aten.hardswish_.default),
):
    _LAYERS |= dict.fromkeys(_operators, _activation(_cls))
