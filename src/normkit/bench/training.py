"""A training step of a whole model: as it is, accelerated, compiled, and compiled through normkit's backend.

The yardstick is the same model without its norms. Norms that took no time could not do better, unless they take over
the activations and additions behind them as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.bench.cell import Effort, Record, time_steps
from normkit.bench.clock import Step
from normkit.bench.models import MODELS, Setting
from normkit.bench.parity import Agreement, objection, to_json
from normkit.bench.peers import BASELINE

TELLING = 0.5
"""A relative error of the plain model's gradients beyond which comparing them says little."""
NO_NORMS = "no norms"
"""The yardstick. It computes something else, so it has no parity."""
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
RATE = 1e-6
"""Of the optimizer: the model should hardly move while it is timed."""


@dataclass
class Trainee:
    """One variant of a model with its own parameters and optimizer."""

    model: nn.Module
    """Holds the parameters."""
    call: Callable[[Tensor], Tensor]
    setting: Setting
    inputs: Tensor
    targets: Tensor
    dtype: str

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9, foreach=True)

    @property
    def low(self) -> bool:
        """Under autocast."""
        return self.dtype in ("bfloat16", "float16")

    def loss(self) -> Tensor:
        kind = getattr(torch, self.dtype) if self.low else torch.bfloat16
        with torch.autocast(self.inputs.device.type, kind, enabled=self.low):
            return self.setting.loss(self.call(self.inputs), self.targets)

    def results(self) -> dict[str, Tensor]:
        """The loss of one step, and all its gradients in one row."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        gradients = [p.grad.detach().double().flatten() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return {"loss": loss.detach().double(), "gradients": torch.cat(gradients)}

    def _finish(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> Step:
        return Step(self.loss, self._finish)


class Absent(Exception):
    """This version of normkit does not have what the variant needs."""


Pair = tuple[nn.Module, Callable[[Tensor], Tensor]]


def _accelerated(model: nn.Module) -> Pair:
    accelerate: Any = getattr(nk, "accelerate_", None)
    if accelerate is None:
        raise Absent("this version of normkit has no accelerate_")
    accelerate(model)
    return model, model


def _compiled(model: nn.Module) -> Pair:
    return model, torch.compile(model, dynamic=False)


def _compiled_by_normkit(model: nn.Module) -> Pair:
    if "normkit" not in torch.compiler.list_backends():
        raise Absent('this version of normkit has no torch.compile(..., backend="normkit")')
    return model, torch.compile(model, backend="normkit", dynamic=False)


VARIANTS: dict[str, Callable[[nn.Module], Pair]] = {
    BASELINE: lambda model: (model, model),
    "normkit": _accelerated,
    "torch.compile": _compiled,
    "torch.compile, normkit": _compiled_by_normkit,
}
"""Each is given a copy of the model and returns it (it holds the parameters) with what is called."""


def measure(name: str, dtype: str, layout: str, effort: Effort, device: str = "cpu") -> list[Record]:
    """One record per variant, measured, refused or skipped, and one of the yardstick.

    float16 and bfloat16 are autocast over float32 parameters, as people train. Loss and gradients are compared with
    those of the same model in float64: a variant may be twice as far from them as the plain model is, and by some
    roundings. That is weak where the plain model is far off itself: at its first step a ResNet-50 in bfloat16 is (a
    remark says so). So the variant is compared without autocast as well.
    """
    setting = MODELS[name]
    about = {
        "kind": "model",
        "op": name,
        "dtype": dtype,
        "layout": layout,
        "device": device,
        "reason": setting.told,
    }
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, targets = (tensor.to(device) for tensor in setting.batch())
    x = x.contiguous(memory_format=form)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    plain = setting.make().to(device).to(memory_format=form).train()  # type: ignore[call-overload]
    torch.set_rng_state(generator_state)
    right = _exact(plain, setting, x, targets)
    rounding = torch.finfo(getattr(torch, dtype)).eps
    allowed: dict[str, float] = {}
    records: list[Record] = []
    steps: dict[str, Step] = {}
    for variant, make in VARIANTS.items():
        if effort.wanted and variant not in (BASELINE, *effort.wanted):
            continue
        record: Record = {**about, "implementation": variant}
        try:
            trainee = Trainee(*make(copy.deepcopy(plain)), setting, x, targets, dtype)
            errors = _errors(trainee, right)
        except Absent as reason:
            records.append({**record, "state": "skipped", "why": str(reason)})
            continue
        except Exception as problem:  # the other variants are still worth their numbers
            state = "skipped" if variant == "torch.compile" else "failed"  # there may be no C++ compiler here
            records.append({**record, "state": state, "why": f"{type(problem).__name__}: {str(problem)[:300]}"})
            continue
        if variant == BASELINE:
            single = torch.finfo(torch.float32).eps
            eps = {what: single if what.endswith("float32") else rounding for what in errors}
            allowed = {what: 2 * error + _floor(what) * eps[what] for what, error in errors.items()}
            if errors["gradients"] > TELLING:
                record["remark"] = f"gradients are {errors['gradients']:.1f} times their own size away from float64's"
        found = {what: Agreement(error, allowed[what]) for what, error in errors.items()}
        record["parity"] = to_json(found)
        if (wrong := objection(found)) is not None:
            records.append({**record, "state": "refused", "why": f"parity is red, so it is not timed: {wrong}"})
            continue
        records.append({**record, "state": "measured"})
        steps[variant] = trainee.step()
    if not effort.wanted or NO_NORMS in effort.wanted:
        bare = _without_norms(copy.deepcopy(plain))
        records.append({**about, "implementation": NO_NORMS, "state": "measured"})
        steps[NO_NORMS] = Trainee(bare, bare, setting, x, targets, dtype).step()
    for variant, told in time_steps(steps, effort, device).items():
        next(r for r in records if r["implementation"] == variant).update(told)
    torch.compiler.reset()
    return records


def _without_norms(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, _NORMS):
            model.set_submodule(name, nn.Identity())
    return model


def _floor(what: str) -> int:
    """Roundings that no variant has to stay below: one number, the loss, can be right by luck, millions can not."""
    return 16 if what.startswith("loss") else 4


def _errors(trainee: Trainee, right: dict[str, Tensor]) -> dict[str, float]:
    errors = {what: _distance(got, right[what]) for what, got in trainee.results().items()}
    if trainee.low:
        single = replace(trainee, dtype="float32").results()
        errors |= {f"{what} in float32": _distance(got, right[what]) for what, got in single.items()}
    return errors


def _exact(plain: nn.Module, setting: Setting, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(plain).double()
    x, targets = (t.double() if t.is_floating_point() else t for t in (x, targets))
    return Trainee(model, model, setting, x, targets, "float64").results()


def _distance(got: Tensor, right: Tensor) -> float:
    return float((got - right).norm() / right.norm()) if got.shape == right.shape else math.inf
