"""What is measured on a GPU, each row with its goal; in this order, because the time is limited."""

from __future__ import annotations

from dataclasses import dataclass, replace

from normkit.bench.cases import Case


@dataclass(frozen=True)
class Goal:
    """For forward and backward together, on an H200 in bfloat16."""

    bandwidth: float | None = None
    """Fraction of the copy bandwidth, counted on the floor of memory traffic."""
    eager: float | None = None
    """Times as fast as torch's operators."""
    compiled: float | None = None
    """Times as fast as ``torch.compile``."""


@dataclass(frozen=True)
class Row:
    """One case in one type and layout."""

    case: Case
    goal: Goal
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    streamed: bool = True
    """The tensor is larger than what stays on chip, so a statistic of batch norm takes a pass of its own."""
    autotuned: bool = False
    """``torch.compile`` is timed with ``mode="max-autotune-no-cudagraphs"`` too, which takes it long."""

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.case.shape))
        return f"{self.case.op} {shape} {self.dtype} {self.layout}"

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
_CHIP_2 = Case("batch", (64, 512, 28, 28), "ResNet-50, stage 2: 51 MB, about the second-level cache", activation="relu")
_UNET = Case("group:32", (8, 320, 64, 64), "U-Net of latent diffusion", activation="silu")
_DEEP = Case("group:32", (8, 1280, 16, 16), "U-Net of latent diffusion, lowest level", activation="silu")
_VAE = Case("group:32", (1, 256, 512, 512), "image decoder, one sample: few groups, long ones", activation="silu")
_VIDEO = Case("group:32", (1, 128, 20, 256, 256), "video decoder, one sample", activation="silu")
_VOLUME = Case("instance", (2, 64, 64, 64, 64), "nnU-Net in three dimensions", activation="leaky_relu")
_RMS = Case("rms", (16384, 4096), "a 7B model, 16k tokens", features_last=True)
_RMS_WIDE = Case("rms", (8192, 8192), "a 70B model", features_last=True)
_RMS_SHORT = Case("rms", (131072, 128), "queries and keys: very short rows", features_last=True)
_LAYER = Case("layer", (16384, 4096), "GPT, 16k tokens", features_last=True)
_LAYER_WIDE = Case("layer", (1024, 12288), "GPT-3, one sequence: few wide rows", features_last=True)
_TINY = Case("batch", (8, 64, 22, 23), "1 MB: the cost of a call decides who is faster")

_BATCH = Goal(0.80, 2.0, 1.2)
_FITS = Goal(None, 2.0, 1.3)
_GROUP = Goal(0.80, 3.0, 1.2)
_INSTANCE = Goal(0.80, 2.0, 1.2)
_ROWS = Goal(0.80, 1.8, 1.8)

ROWS: tuple[Row, ...] = (
    Row(_BLOCK, _BATCH, layout=_LAST, autotuned=True),
    Row(_BLOCK, replace(_BATCH, eager=2.5)),
    Row(_UNET, _GROUP, streamed=False),
    Row(_UNET, _GROUP, layout=_LAST, streamed=False),
    Row(_RMS, _ROWS, autotuned=True),
    Row(_LAYER, _ROWS),
    Row(_VAE, _GROUP),
    Row(_VAE, _GROUP, layout=_LAST),
    Row(_CHIP, _FITS, layout=_LAST, streamed=False),
    Row(_CHIP, _FITS, streamed=False),
    Row(_VOLUME, _INSTANCE),
    Row(_VOLUME, _INSTANCE, layout=_LAST),
    Row(_STEM, _BATCH, layout=_LAST),
    Row(_VIDEO, _GROUP),
    Row(_RMS_WIDE, _ROWS),
    Row(_RMS_SHORT, _ROWS),
    Row(_LAYER_WIDE, _ROWS),
    Row(_CHIP_2, _FITS, layout=_LAST, streamed=False),
    Row(_DEEP, _GROUP, streamed=False),
    Row(_BLOCK, Goal(), dtype="float16", layout=_LAST),
    Row(_BLOCK, Goal(), dtype="float32", layout=_LAST),
    Row(_UNET, Goal(), dtype="float32", streamed=False),
    Row(_RMS, Goal(), dtype="float32"),
    Row(_TINY, Goal(), streamed=False),
)
MODELS = ("resnet50", "unet_block", "llm_layer")
"""ResNet-50 under autocast, channels last; a block of a diffusion U-Net; a layer of a 1B-parameter language model."""
