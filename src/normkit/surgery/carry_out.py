"""carry_out: prescriptions become operations. The one way from what a rule or a strategy asks for to another model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from normkit import surgery
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

OPERATIONS = (
    "accelerate_",
    "calibrate_",
    "convert_",
    "fold_",
    "freeze_",
    "merge_statistics_",
    "progressive_",
    "set_statistics_",
    "settle_",
    "sync_",
    "unfreeze_",
    "unsync_",
)


def carry_out(
    model: nn.Module, prescriptions: Iterable[Prescription], *, given: Mapping[str, Any] | None = None
) -> tuple[Certificate, ...]:
    """Do what is prescribed; all of it or nothing.

    Prescriptions that ask for the same operation with the same options are one operation on all their modules.

    Args:
        model: changed in place.
        prescriptions: each with an ``operation``.
        given: what a prescription cannot hold: ``optimizer``, ``example_inputs``, ``loader``, ``match`` ...; each
            operation gets what it takes.

    Returns:
        A certificate per operation, in the order of the first prescription of each.

    Raises:
        ValueError: a prescription has no operation, or one that does not exist; nothing was changed.
        Exception: whatever an operation raises; those before it are taken back.
    """
    certificates: list[Certificate] = []
    try:
        for (operation, options), modules in _grouped(prescriptions).items():
            function = getattr(surgery, operation)
            certificates.append(function(model, **_arguments(function, dict(options), modules, given or {})))
    except BaseException:
        for certificate in reversed(certificates):
            if certificate.taking_back is not None:
                certificate.undo()
        raise
    return tuple(certificates)


def lacks(prescription: Prescription, given: Mapping[str, Any]) -> list[str]:
    """What the operation cannot do without and nobody has given: ``calibrate_`` its loader."""
    takes = list(inspect.signature(getattr(surgery, prescription.operation)).parameters.values())[1:]
    wanted = [p.name for p in takes if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    have = {name for name, value in given.items() if value is not None} | dict(prescription.options).keys()
    return [name for name in wanted if name not in have]


def _grouped(prescriptions: Iterable[Prescription]) -> dict[tuple[str, tuple[tuple[str, Any], ...]], set[str]]:
    groups: dict[tuple[str, tuple[tuple[str, Any], ...]], set[str]] = {}
    for prescription in prescriptions:
        if prescription.operation not in OPERATIONS:
            what = f"operation {prescription.operation!r}" if prescription.operation else "no operation"
            raise ValueError(
                f"carry_out: {prescription.action!r} has {what}.\n"
                f"  a prescription that is carried out names one of: {', '.join(OPERATIONS)}"
            )
        groups.setdefault((prescription.operation, prescription.options), set()).add(prescription.module)
    return groups


def _arguments(
    function: Callable[..., Certificate], options: dict[str, Any], modules: set[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    takes = inspect.signature(function).parameters
    arguments = {name: value for name, value in given.items() if name in takes and name not in options}
    if "" not in modules and "filter_fn" in takes:
        arguments["filter_fn"] = lambda module, name: name in modules
    return {**arguments, **options}
