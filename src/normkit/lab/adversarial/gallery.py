"""Gallery: acts between the steps of an adversarial run, and keeps what its page shows."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.adversarial.quality import COLLAPSED, Modes
from normkit.lab.data import Data
from normkit.lab.experiment import Metric
from normkit.lab.step import Step

PICTURES = 6


class Gallery:
    """A picture of what the generator makes of fixed noise at `PICTURES` moments, and the spread of the loss.

    modes, metric: what the end of a run is measured by. picture: samples (n, ...) to one grey picture (side, side) of
    numbers between 0 and 1; shown: of how many samples.
    """

    def __init__(self, modes: Modes, metric: Metric, picture: Callable[[Tensor], Tensor], shown: int) -> None:
        self.modes, self.metric, self.picture, self.shown = modes, metric, picture, shown
        self.pictures: list[list[Any]] = []
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # of the losses in the second half of the run

    def __call__(self, step: Step) -> None:
        if step.number > step.total // 2:
            self.count += 1
            apart = step.loss - self.mean
            self.mean += apart / self.count
            self.squares += apart * (step.loss - self.mean)
        if step.number in moments(step.total):
            still = torch.Generator().manual_seed(0)
            noise = torch.randn(self.shown, *step.inputs.shape[1:], generator=still)
            self.pictures.append([step.number, self._pixels(generate(step.model, noise))])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"pictures": self.pictures, "losses": [self.count, self.mean, self.squares]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.pictures = [list(one) for one in state["pictures"]]
        self.count, self.mean, self.squares = state["losses"]

    def conclude(self, model: nn.Module, data: Data) -> dict[str, Any]:
        """What status.json says: measures of the test noise's samples, and the pictures.

        real_against_real is the metric of as many real samples of the training data: no generator can be expected
        to be nearer to the test data than they are.
        """
        noise, real = data.test.first(len(data.test))
        samples = generate(model, noise)
        _, others = data.train.first(len(real))
        covered = self.modes.covered(samples)
        return {
            "measures": {
                "modes_covered": covered,
                "high_quality_share": float(self.modes.shares(samples).sum()),
                "collapsed": covered < COLLAPSED * self.modes.count,
                "loss_variance": self.squares / self.count if self.count else None,
                "real_against_real": float(self.metric.function(others, real)),
            },
            "pictures": {"real": self._pixels(real[: self.shown]), "at": self.pictures},
        }

    def _pixels(self, samples: Tensor) -> str:
        """The picture as bytes, row by row, in base64; what is not finite is black."""
        grey = torch.nan_to_num(self.picture(samples), nan=0.0).clamp(0, 1)
        return base64.b64encode((255 * grey).round().to(torch.uint8).numpy().tobytes()).decode()


def moments(steps: int) -> set[int]:
    """The steps after which a picture is taken: each 2.2 times as late as the one before, the last step included."""
    return {max(1, round(steps / 2.2**place)) for place in range(PICTURES)}


@torch.no_grad()
def generate(model: nn.Module, noise: Tensor) -> Tensor:
    """Samples in evaluation mode; the model is left in the mode it was in."""
    was = model.training
    samples = model.eval()(noise)
    model.train(was)
    return samples


def density(samples: Tensor, side: int = 32, *, reach: float) -> Tensor:
    """Points (n, 2) as a picture: how many lie in each cell of the square from -reach to reach, the root of it."""
    cells = ((samples / reach + 1) / 2 * side).nan_to_num(-1.0).clamp(-1, side).floor().long()
    inside = cells[((cells >= 0) & (cells < side)).all(1)]
    counts = torch.bincount((side - 1 - inside[:, 1]) * side + inside[:, 0], minlength=side * side).view(side, side)
    return (counts / max(1, int(counts.max()))).sqrt()


def tiled(images: Tensor) -> Tensor:
    """The first sixteen images (n, 1, h, h) between -1 and 1, four by four, as one picture between 0 and 1."""
    rows = (images[:16, 0] + 1).div(2).unflatten(0, (4, 4))  # (4, 4, h, h)
    return rows.permute(0, 2, 1, 3).reshape(4 * images.shape[-1], -1)
