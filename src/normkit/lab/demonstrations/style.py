"""style: what instance norm, AdaIN and batch norm do to the look of the two photographs that scikit-learn ships.

No network that was trained on pictures is at hand, so the features are fixed: `Bands`, which lose nothing, so that the
way back to a picture needs no decoder. Huang & Belongie 2017 (arXiv:1703.06868) have a trained network for either way.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.blocks import AdaptiveInstanceNorm
from normkit.lab.demonstrations.bands import Bands, RandomConvolutions, moments
from normkit.lab.environment import environment
from normkit.lab.errors import missing_extra
from normkit.lab.parallel import Parallel
from normkit.norms.batch_norm import BatchNorm2d
from normkit.norms.instance_norm import InstanceNorm2d
from normkit.vocabulary.record import write_atomically, write_json

REPEATS = 3
FILE = "style.json"


def photographs() -> dict[str, Tensor]:
    """Both, (1, 3, 427, 640), from 0 to 1."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise missing_extra("scikit-learn", "lab", "the photographs of this demonstration") from None
    found = load_sample_images()
    names = [Path(name).stem for name in found.filenames]
    return {
        name: torch.from_numpy(picture.copy()).movedim(-1, 0)[None].float() / 255
        for name, picture in zip(names, found.images, strict=True)
    }


@torch.no_grad()
def style(directory: Path, pictures: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Fills a directory with pictures, numbers and a page; returns the numbers.

    pictures: two of one size; None: the photographs of scikit-learn.
    """
    from normkit.report import style as report

    shown = pictures or photographs()
    judge = Judge()
    summary: dict[str, Any] = {
        "pictures": list(shown),
        "norms": [_normed(name, shown, judge) for name in ("none", "batch", "instance")],
        "transfers": [_transfer(content, look, shown, judge) for content, look in (list(shown), list(shown)[::-1])],
        "correlation_of_both": correlation(*shown.values()),
        "environment": environment(Parallel("sequential", 1)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in shown.items():
        write_atomically(directory / f"{name}.jpg", jpeg(picture))
    for row in (*summary["norms"], *summary["transfers"]):
        for name, picture in row.pop("made").items():
            write_atomically(directory / f"{name}.jpg", jpeg(picture))
    write_json(directory / FILE, summary)
    report.write(directory)
    return summary


class Judge:
    """Distance of two pictures in style: of the moments of bands, and of random convolutions."""

    def __init__(self) -> None:
        self.bands, self.convolutions = Bands(), RandomConvolutions()

    def styles(self, picture: Tensor) -> dict[str, Tensor]:
        """The moments, by what they are of."""
        return {
            "bands": moments(self.bands(picture)),
            "convolutions": torch.cat([moments(layer) for layer in self.convolutions(picture)], 1),
        }

    def apart(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """Euclidean distance of the moments."""
        mine, other = self.styles(first), self.styles(second)
        return {of: float((mine[of] - other[of]).norm()) for of in mine}


def transferred(content: Tensor, look: Tensor) -> Tensor:
    """The content with the moments of the other picture in every band, not yet cut to what can be shown."""
    bands = Bands()
    return bands.picture(AdaptiveInstanceNorm()(bands(content), bands(look)))


def normed(name: str, both: Tensor) -> Tensor:
    """Both pictures (2, 3, h, w) through one norm of their bands, whose weight and bias are the mean of their moments.

    Whatever the norm takes away, one weight and one bias for both cannot give back.
    """
    bands = Bands()
    features = bands(both)
    if name != "none":
        kind = {"batch": BatchNorm2d, "instance": InstanceNorm2d}[name]
        norm = kind(bands.channels, affine=True)
        bias, weight = moments(features).mean(0).chunk(2)
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        features = norm.train()(features)
    return bands.picture(features)


def _normed(name: str, shown: dict[str, Tensor], judge: Judge) -> dict[str, Any]:
    """How far apart in style the pictures are behind the norm, as a part of how far they were."""
    both = torch.cat(list(shown.values()))
    made, seconds = _timed(lambda: visible(normed(name, both)))
    before, after = judge.apart(*shown.values()), judge.apart(*made.split(1))
    return {
        "norm": name,
        "apart": {of: after[of] / before[of] for of in after},
        "content_correlation": correlation(both, made),
        "seconds": seconds,
        "made": {}
        if name == "none"
        else {f"{picture}-{name}": one for picture, one in zip(shown, made.split(1), strict=True)},
    }


def _transfer(content: str, look: str, shown: dict[str, Tensor], judge: Judge) -> dict[str, Any]:
    made, seconds = _timed(lambda: visible(transferred(shown[content], shown[look])))
    before, after = judge.apart(shown[content], shown[look]), judge.apart(made, shown[look])
    faded = visible(transferred(0.25 + shown[content] / 2, shown[look]))
    return {
        "content": content,
        "style": look,
        "style_error": {of: after[of] / before[of] for of in after},
        "content_correlation": correlation(shown[content], made),
        "style_correlation": correlation(shown[look], made),
        "change_at_half_contrast": float((faded - made).abs().mean()),
        "seconds": seconds,
        "made": {f"{content}-as-{look}": made},
    }


def correlation(first: Tensor, second: Tensor) -> float:
    """Of the light of two pictures, place by place."""
    light = torch.stack([first.mean(1).flatten(), second.mean(1).flatten()]).double()
    return float(light.corrcoef()[0, 1])


def visible(picture: Tensor) -> Tensor:
    """Cut to the range that can be shown."""
    return picture.clamp(0, 1)


def jpeg(picture: Tensor) -> bytes:
    """The file of a picture (1, 3, h, w) from 0 to 1."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.fromarray((255 * picture[0]).round().byte().movedim(0, -1).numpy()).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it makes, and the median of the seconds it takes."""
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        made = make()
        taken.append(time.perf_counter() - begin)
    return made, statistics.median(taken)
