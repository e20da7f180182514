"""Forwards that a graph would change, and steps behind a norm that somebody would miss."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Branches(nn.Module):
    """A norm and a ReLU, and in each subclass something that a graph would freeze or lose."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.map = nn.Linear(4, 4)
        self.kept: list[Tensor] = []
        self.offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class OnTheMode(Branches):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y * 2 if self.training else y


class DropoutByHand(Branches):
    def forward(self, x):
        return F.dropout(F.relu(self.norm(x)), 0.5, self.training)


class OnTheModeOfAChild(Branches):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y + 1 if self.map.training else y


class OnAValue(Branches):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y if y.sum() > 0 else -y


class OnAShape(Branches):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y[:3] if x.shape[0] > 3 else y


class OnTheTypeOfAnIntermediate(Branches):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y if isinstance(y, Tensor) else y[0]


class WithoutGradients(Branches):
    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.norm(x))
        return y + x


class OnTheGradMode(Branches):
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y if torch.is_grad_enabled() else y + 1


class InAnotherPrecision(Branches):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.map(x)
        return F.relu(self.norm(y.float()))


class Checkpointed(Branches):
    def forward(self, x):
        return checkpoint(lambda x: F.relu(self.norm(x)), x, use_reentrant=False)


class Random(Branches):
    def forward(self, x):
        return F.relu(self.norm(x)) * random.random()


class RandomTensor(Branches):
    def forward(self, x):
        return F.relu(self.norm(x)) * torch.rand(4)


class OwnTensor(Branches):
    def forward(self, x):
        return F.relu(self.norm(x)) * torch.ones(4)


class Remembers(Branches):
    def forward(self, x):
        self.last = F.relu(self.norm(x))
        return self.last


class Collects(Branches):
    def forward(self, x):
        self.kept.append(x)
        return F.relu(self.norm(x))


class AnyNumber(Branches):
    def forward(self, *xs):
        return F.relu(self.norm(xs[0]))


class Unpacks(Branches):
    def forward(self, x):
        first, *_ = F.relu(self.norm(x))
        return first


class Scaled(Branches):
    def forward(self, x):
        return F.relu(self.norm(x)) + self.offset


class AsksForTheTypeOfItsInput(Branches):
    def forward(self, x):
        if isinstance(x, Tensor):
            x = [x]
        return F.relu(self.norm(torch.cat(x)))


FROZEN = {
    OnTheMode: "depends on self.training",
    DropoutByHand: "depends on self.training",
    OnTheModeOfAChild: "depends on self.map.training",
    OnAValue: "branches on a value",
    OnAShape: "branches on a value",
    OnTheTypeOfAnIntermediate: "asks for the type of an intermediate value",
    WithoutGradients: "switches the grad mode or autocast inside",
    OnTheGradMode: "does something else without gradients",
    InAnotherPrecision: "switches the grad mode or autocast inside",
    Checkpointed: "checkpoints activations inside",
    Random: "draws random numbers",
    RandomTensor: "makes tensors of its own",
    OwnTensor: "makes tensors of its own",
    Remembers: "writes self.last",
    Collects: "reads self.kept",
    AnyNumber: "takes any number of arguments",
    Unpacks: "unpacks a value",
}
"""Forward -> what the refusal says."""


class Two(nn.Module):
    """A norm, an addition, a ReLU; each subclass in a way that must not be fused, or not wholly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.other = nn.LayerNorm(4)
        self.map = nn.Linear(4, 4)
        self.inplace = nn.ReLU(inplace=True)


class SecondReaderOfTheNorm(Two):
    def forward(self, x):
        y = self.norm(self.map(x))
        return F.relu(y) + y


class SecondReaderOfTheSum(Two):
    def forward(self, x):
        y = self.norm(self.map(x)) + x
        return F.relu(y) * y


class AliasOfTheSum(Two):
    def forward(self, x):
        y = self.norm(self.map(x))
        alias = y
        y += x
        return F.relu(y) * alias


class ViewOfTheNorm(Two):
    def forward(self, x):
        y = self.norm(self.map(x))
        view = y[:, :2]
        y += x
        return F.relu(y).sum(1) * view.sum(1)


class IntoTheResidual(Two):
    def forward(self, x):
        h = self.map(x)
        residual = h * 2
        residual += self.norm(h)
        return residual


class ActivatedThenRead(Two):
    def forward(self, x):
        y = self.norm(self.map(x))
        z = self.inplace(y)
        return z + y


class InputOverwritten(Two):
    def forward(self, x):
        h = self.map(x)
        y = self.norm(h)
        z = h.mul_(3.0)
        return F.relu(y + z)


class InputOverwrittenByAFunction(Two):
    def forward(self, x):
        h = self.map(x)
        y = self.norm(h)
        z = torch.sigmoid_(h)
        return F.relu(y + z)


class InputOverwrittenByAModule(Two):
    def forward(self, x):
        h = self.map(x)
        y = self.norm(h)
        z = self.inplace(h)
        return F.relu(y + z)


class ResidualOverwritten(Two):
    def forward(self, x):
        h = self.map(x) * 2
        y = self.norm(x) + h
        z = h.neg_()
        return F.relu(y) + z


class SameNormOnTheWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.norm(x)
        z = self.norm(x * 5 + 3)  # moves the running statistics after the first
        return F.relu(y + z)


class StatisticsReadOnTheWay(SameNormOnTheWay):
    def forward(self, x):
        y = self.norm(x)
        z = self.norm.running_mean * x
        return F.relu(y + z)


PARTLY = {
    SecondReaderOfTheNorm: "has a second reader",
    SecondReaderOfTheSum: "has a second reader",
    AliasOfTheSum: "has a second reader",
    ViewOfTheNorm: "has a second reader",
    IntoTheResidual: "is changed in place by the addition",
    ActivatedThenRead: "has a second reader",
    InputOverwritten: "the input of the norm is changed in place by mul_",
    InputOverwrittenByAFunction: "the input of the norm is changed in place by sigmoid_",
    InputOverwrittenByAModule: "the input of the norm is changed in place by inplace",
    ResidualOverwritten: "the residual is changed in place by neg_",
    SameNormOnTheWay: "the same norm is applied again",
    StatisticsReadOnTheWay: "the running statistics are read by mul",
}
"""Forward -> what the refusal says of the step."""
