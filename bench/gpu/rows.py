"""What is measured on a GPU, each row with its goal; in this order, because the time is limited."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from normkit.bench.cases import Case

Part = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class Goal:
    """For one part of a training step, on an H200 in bfloat16; ``step``: forward and backward together."""

    bandwidth: float | None = None
    """Fraction of the copy bandwidth, counted on the floor of memory traffic."""
    eager: float | None = None
    """Times as fast as torch's operators."""
    compiled: float | None = None
    """Times as fast as ``torch.compile``."""
    part: Part = "step"

    def __str__(self) -> str:
        of = ((self.bandwidth, "{:.2f} of copy"), (self.eager, "{:g}x eager"), (self.compiled, "{:g}x compile"))
        return ("" if self.part == "step" else f"{self.part} ") + ", ".join(
            "≥ " + words.format(least) for least, words in of if least is not None
        )


@dataclass(frozen=True)
class Row:
    """One case in one type and layout."""

    case: Case
    goals: tuple[Goal, ...] = ()
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    streamed: bool = True
    """The tensor is larger than what stays on chip, so a statistic of batch norm takes a pass of its own."""
    brief: bool = False
    """A small tensor, for the cost of a call: timed against torch's operators alone."""

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.case.shape))
        return f"{self.case.op} {shape} {self.dtype} {self.layout}"

    def floor(self, part: Part) -> int:
        """The fewest bytes that the part of a step has to move."""
        forward, step = self.case.floor(self.streamed)
        return {"forward": forward, "backward": step - forward, "step": step}[part] * self.case.size(self.dtype)

    @property
    def small(self) -> Row:
        """The same on a tensor that the oracle takes in no time."""
        return replace(self, case=replace(self.case, shape=_small(self.case)))

    @property
    def toy(self) -> Row:
        """The same on a tensor for Triton's interpreter."""
        shape = (3, *self.case.shape[1:]) if self.case.features_last else (2, self.case.shape[1])
        shape = (3, 40) if self.case.features_last else (*shape, *(3 for _ in self.case.shape[2:]))
        if not self.case.features_last:
            shape = (2, 64 if self.case.norm.startswith("group") else 8, *shape[2:])
        return replace(self, case=replace(self.case, shape=shape))


def _small(case: Case) -> tuple[int, ...]:
    """At most about a million elements: fewer samples, then less space; channels stay."""
    shape, fixed = list(case.shape), (len(case.shape) - 1 if case.features_last else 1)
    order = [axis for axis in range(len(shape)) if axis != fixed]
    for axis in order:
        while shape[axis] > 3 and _elements(shape) > 2**20:
            shape[axis] = shape[axis] // 2 + shape[axis] % 2
    return tuple(shape)


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


_LAST = "channels_last"
_BLOCK = Case("batch", (128, 256, 56, 56), "ResNet-50, stage 1, end of a block", activation="relu", residual=True)
_STEM = Case("batch", (128, 64, 112, 112), "ResNet-50, stem", activation="relu")
_CHIP = Case("batch", (32, 64, 56, 56), "ResNet-50, stage 1: 13 MB fit on chip", activation="relu")
_CHIP_6 = Case("batch", (32, 128, 28, 28), "ResNet-50, stage 2: 6 MB fit on chip", activation="relu")
_CHIP_26 = Case("batch", (64, 64, 56, 56), "ResNet-50, stage 1: 26 MB, the most that fits", activation="relu")
_CACHED = Case("batch", (64, 512, 28, 28), "ResNet-50, stage 2: 51 MB, about the second-level cache", activation="relu")
_UNET = Case("group:32", (8, 320, 64, 64), "U-Net of latent diffusion", activation="silu")
_DEEP = Case("group:32", (8, 1280, 16, 16), "U-Net of latent diffusion, lowest level", activation="silu")
_VAE = Case("group:32", (1, 256, 512, 512), "image decoder, one sample: few groups, long ones", activation="silu")
_VIDEO = Case("group:32", (1, 128, 20, 256, 256), "video decoder, one sample", activation="silu")
_VOLUME = Case("instance", (2, 32, 128, 128, 128), "nnU-Net in three dimensions, first level", activation="leaky_relu")
_VOLUME_2 = Case("instance", (2, 64, 64, 64, 64), "nnU-Net in three dimensions, second level", activation="leaky_relu")
_RMS = Case("rms", (16384, 4096), "a 7B model, 16k tokens", features_last=True)
_RMS_WIDE = Case("rms", (8192, 8192), "a 70B model", features_last=True)
_RMS_SHORT = Case("rms", (131072, 128), "queries and keys: very short rows", features_last=True)
_LAYER = Case("layer", (16384, 4096), "GPT, 16k tokens", features_last=True)
_LAYER_WIDE = Case("layer", (1024, 12288), "GPT-3, one sequence: few wide rows", features_last=True)
_LAYER_MAPS = Case("layer", (16, 2**20), "layer norm over whole maps: a few rows of a million", features_last=True)

_BATCH = (Goal(0.80, 2.0, 1.2),)
_BATCH_PLANES = (Goal(0.80, 2.5, 1.2),)
_FITS = (Goal(None, 2.0, 1.3),)
_GROUP = (Goal(0.80, 3.0, 1.2),)
_INSTANCE = (Goal(0.80, 2.0, 1.2),)
_ROWS = (Goal(0.85, 1.1, 1.0, "forward"), Goal(0.80, 1.8, 1.8, "backward"))


def _calls() -> tuple[Row, ...]:
    """Where the cost of a call ends to matter, which ``LEAST`` of the backend is about."""
    why = "{:,} elements: call or work"
    images = [
        Case("batch", (n, 64, 16, 16), why.format(n << 14), activation=follows)
        for follows in (None, "relu")
        for n in (4, 16, 64, 256)
    ]
    rows = [
        Case(norm, (n, 1024), why.format(n << 10), features_last=True)
        for norm in ("layer", "rms")
        for n in (64, 1024, 4096)
    ]
    return tuple(Row(case, streamed=False, brief=True) for case in (*images, *rows))


def _networks() -> tuple[Row, ...]:
    """What known networks are made of, beside the rows above: a kernel that is good at one size may not be at another.

    Streamed: more than the 50 MB of a second-level cache.
    """

    def row(case: Case, layout: str = "contiguous") -> Row:
        return Row(case, layout=layout, streamed=2 * _elements(list(case.shape)) > 50e6)

    image = lambda n, c, side, follows: Case(
        "batch", (n, c, side, side), f"ResNet-50, batch of {n}", activation="relu", residual=follows
    )
    blocks = ((64, 112, False), (64, 56, False), (256, 56, True), (128, 28, False), (512, 28, True), (256, 14, False))
    blocks = (*blocks, (1024, 14, True), (2048, 7, True))
    images = [row(image(n, c, side, follows), _LAST) for n in (32, 64, 256) for c, side, follows in blocks]
    volumes = [
        row(Case("instance", (2, c, side, side, side), "nnU-Net in three dimensions", activation="leaky_relu"))
        for c, side in ((128, 32), (256, 16), (320, 8))
    ]
    styles = [row(Case("instance", (8, 64, 256, 256), "style transfer", activation="relu"))]
    group = lambda shape, why, layout=_LAST: row(Case("group:32", shape, why, activation="silu"), layout)
    unet = ((320, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (1280, 8), (2560, 8))
    groups = [group((n, c, side, side), f"U-Net of latent diffusion, {n} samples") for n in (2, 8) for c, side in unet]
    decoder = ((128, 512), (512, 128), (128, 1024))
    groups += [group((1, c, side, side), "image decoder, one sample", "contiguous") for c, side in decoder]
    groups += [group((32, 256, 56, 56), "ResNet-50 with group norm", "contiguous")]
    wide = {
        (12608, 768): "ViT-B", (16448, 1024): "ViT-L", (200704, 96): "Swin, ConvNeXt", (4096, 12288): "GPT-3",
    }  # fmt: skip
    rows = [row(Case("layer", shape, why, features_last=True)) for shape, why in wide.items()]
    language = {
        (8192, 5120): "a 13B model", (4096, 16384): "a 405B model", (2048, 4096): "a 7B model, 2k tokens",
        (512, 4096): "a 7B model, 512 tokens", (1, 4096): "a 7B model, one token", (8192, 128): "queries and keys",
    }  # fmt: skip
    rows += [row(Case("rms", shape, why, features_last=True)) for shape, why in language.items()]
    return (*images, *volumes, *styles, *groups, *rows)


ROWS: tuple[Row, ...] = (
    Row(_BLOCK, _BATCH, layout=_LAST),
    Row(_BLOCK, _BATCH_PLANES),
    Row(_UNET, _GROUP, streamed=False),
    Row(_UNET, _GROUP, layout=_LAST, streamed=False),
    Row(_RMS, _ROWS),
    Row(_LAYER, _ROWS),
    Row(_VAE, _GROUP),
    Row(_VAE, _GROUP, layout=_LAST),
    Row(_CHIP, _FITS, layout=_LAST, streamed=False),
    Row(_CHIP, _FITS, streamed=False),
    Row(_VOLUME, _INSTANCE),
    Row(_VOLUME, _INSTANCE, layout=_LAST),
    Row(_CHIP_6, _FITS, layout=_LAST, streamed=False),
    Row(_CHIP_26, _FITS, layout=_LAST, streamed=False),
    Row(_RMS_WIDE, _ROWS),
    Row(_STEM, _BATCH, layout=_LAST),
    Row(_VIDEO, _GROUP),
    Row(_RMS_SHORT, _ROWS),
    Row(_LAYER_WIDE, _ROWS),
    Row(_DEEP, _GROUP, streamed=False),
    *_calls(),
    Row(_CACHED, layout=_LAST, streamed=False),
    Row(_VOLUME_2),
    Row(_LAYER_MAPS),
    Row(_BLOCK, dtype="float16", layout=_LAST),
    Row(_BLOCK, dtype="float32", layout=_LAST),
    Row(_UNET, dtype="float32", streamed=False),
    Row(_RMS, dtype="float32"),
)
ROWS += tuple(row for row in _networks() if row.name not in {other.name for other in ROWS})
"""Those with a goal first: they come before the models, all others after."""
MODELS = ("resnet50", "unet_block", "llm_layer")
"""ResNet-50 under autocast, channels last; a block of a diffusion U-Net; a layer of a 1B-parameter language model."""
