"""What is timed: shapes that people train with, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from normkit.vocabulary.problem import ITEM_SIZE
from normkit.vocabulary.spec import Spec, find

Level = Literal["quick", "default", "thorough"]
LEVELS: tuple[Level, ...] = ("quick", "default", "thorough")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Case:
    """One norm with what follows it, on one shape."""

    norm: str
    """As ``nk.create`` takes it: ``batch``, ``group:32``."""
    shape: tuple[int, ...]
    reason: str
    activation: str | None = None
    residual: bool = False
    features_last: bool = False
    """The features are the last axis, as in a transformer; otherwise they are axis 1."""
    level: Level = "default"

    @property
    def spec(self) -> Spec:
        return find(self.norm.partition(":")[0])[0].spec

    @property
    def op(self) -> str:
        """``batch_norm+add+relu``: the name of the norm, then what follows it in the same layer."""
        per_feature = self.spec.name in ("layer_norm", "rms_norm", "dyt")
        first = "_channels_first" if per_feature and not self.features_last else ""
        return "+".join([self.spec.name + first, *["add"] * self.residual, *filter(None, [self.activation])])

    @property
    def channels(self) -> int:
        return self.shape[-1 if self.features_last else 1]

    @property
    def dim(self) -> int:
        """Spatial axes, as ``nk.create`` counts them."""
        return 1 if self.features_last else max(1, len(self.shape) - 2)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that this shape has."""
        return LAYOUTS if not self.features_last and len(self.shape) > 3 else LAYOUTS[:1]

    def size(self, dtype: str) -> int:
        """Bytes of one tensor."""
        return prod(self.shape) * ITEM_SIZE[dtype]

    def floor(self, streamed: bool = False) -> tuple[int, int]:
        """The fewest memory passes over one tensor: of the forward pass, and of forward and backward together.

        Forward reads x (and the residual) and writes y; backward reads x and the gradient and writes that of x (and,
        behind an activation, that of the residual). ``streamed``: what one statistic pools does not stay in the cache,
        so that batch norm reads its input again, and backward both of its inputs. One bit per element of a ReLU mask
        is not counted.
        """
        forward = 2 + self.residual
        backward = 3 + (self.residual and self.activation is not None)
        if streamed and self.spec.name == "batch_norm":
            forward, backward = forward + 1, backward + 2
        return forward, forward + backward


RESNET = (  # channels, height, what follows, where
    (64, 112, "relu", "stem"),
    (64, 56, "relu", "stage 1"),
    (256, 56, "add", "stage 1, end of a block"),
    (128, 28, "relu", "stage 2"),
    (512, 28, "add", "stage 2, end of a block"),
    (256, 14, "relu", "stage 3"),
    (1024, 14, "add", "stage 3, end of a block"),
    (2048, 7, "add", "stage 4, end of a block"),
)
VOLUMES: tuple[tuple[int, int, Level], ...] = (
    (32, 128, "thorough"),
    (64, 64, "default"),
    (128, 32, "default"),
    (256, 16, "default"),
)
DIFFUSION = ((320, 64), (640, 32), (1280, 16), (1280, 8), (2560, 8), (960, 64), (1920, 32))
LANGUAGE = (
    (16384, 4096, "a 7B model, 16k tokens"),
    (8192, 5120, "a 13B model"),
    (8192, 8192, "a 70B model"),
    (4096, 12288, "GPT-3's width"),
    (4096, 16384, "the widest rows in use"),
)


def _resnet(batch: int, level: Level) -> Iterator[Case]:
    for channels, side, follows, where in RESNET:
        shape = (batch, channels, side, side)
        reason = f"ResNet-50, {where}, batch {batch}"
        add = follows == "add"
        yield Case("batch", shape, reason, activation="relu", residual=add, level=level)
        yield Case("batch", shape, f"{reason}: the norm alone, as on a shortcut", level=level)


def _images() -> Iterator[Case]:
    for channels, side in ((96, 56), (144, 28), (960, 7)):
        yield Case("batch", (32, channels, side, side), "MobileNetV2: channels that are no power of two; ReLU6 apart")
    yield Case("batch", (8, 32, 16, 16), "a small tensor: the fixed cost of a call shows", activation="relu")
    yield Case("batch", (60, 100), "the 3x100 network of `normkit compare`: a call costs more than its arithmetic")
    yield Case("batch", (4096, 1024), "tabular and recommendation: one axis, many features")
    yield Case("batch", (100_000, 32), "point clouds and graphs: very many samples, few features (pytorch#61587)")
    yield Case("instance", (32, 64, 56, 56), "the stage-1 shape of ResNet-50, for comparison with batch norm")
    yield Case("instance", (8, 64, 256, 256), "style transfer", activation="relu")
    for channels, side, level in VOLUMES:
        volume = (2, channels, side, side, side)
        yield Case("instance", volume, "nnU-Net in three dimensions", activation="leaky_relu", level=level)
        yield Case("batch", volume, "U-Net in three dimensions", activation="relu", level=level)
    yield Case("instance", (2, 320, 8, 8, 8), "nnU-Net, the lowest level", activation="leaky_relu")
    for shape in ((6, 256, 20, 28, 28), (6, 320, 10, 14, 14), (6, 128, 6, 7, 7)):
        yield Case("instance", shape, "nnU-Net as in uxlfoundation/oneDNN#1601", level="thorough")


def _groups() -> Iterator[Case]:
    batches: tuple[tuple[int, Level], ...] = ((2, "default"), (8, "thorough"))
    for batch, level in batches:
        for channels, side in DIFFUSION:
            shape = (batch, channels, side, side)
            yield Case("group:32", shape, "U-Net of latent diffusion", activation="silu", level=level)
    yield Case("group:32", (1, 512, 128, 128), "image decoder of latent diffusion", activation="silu")
    for channels, side in ((256, 512), (128, 512), (128, 1024)):
        shape = (1, channels, side, side)
        yield Case("group:32", shape, "image decoder of latent diffusion", activation="silu", level="thorough")
    yield Case("group:32", (1, 128, 20, 256, 256), "video decoder", activation="silu", level="thorough")
    yield Case("group:32", (32, 256, 56, 56), "ResNet-50 with group norm", activation="relu")


def _rows() -> Iterator[Case]:
    for norm in ("layer", "rms"):
        for rows, width, who in LANGUAGE:
            yield Case(norm, (rows, width), who, features_last=True, level="thorough")
        yield Case(norm, (2048, 4096), "a 7B model, one sequence of 2k tokens", features_last=True)
        yield Case(norm, (64, 197, 768), "ViT-B/16, batch 64", features_last=True)
        yield Case(norm, (64, 257, 1024), "ViT-L/14, batch 64", features_last=True)
        yield Case(norm, (8192, 128), "queries and keys of attention: very short rows", features_last=True)
        yield Case(norm, (131_072, 128), "queries and keys, 16k tokens", features_last=True, level="thorough")
        yield Case(norm, (512, 4096), "decoding a batch", features_last=True)
        yield Case(norm, (1, 4096), "decoding one token: nothing but the cost of a call", features_last=True)
        yield Case(norm, (64, 96, 56, 56), "ConvNeXt-T, stage 1, over the channels of images")
        yield Case(norm, (64, 768, 7, 7), "ConvNeXt-T, stage 4, over the channels of images")
    yield Case("layer", (64, 3136, 96), "Swin-T, stage 1", features_last=True)
    yield Case("layer", (1024, 12288), "GPT-3, one sequence", features_last=True, level="thorough")
    yield Case("rms", (2048, 4096), "a block of a language model: sum, then norm", residual=True, features_last=True)
    yield Case("dyt", (64, 197, 768), "ViT-B/16 with dynamic tanh", features_last=True)
    yield Case("dyt", (16384, 4096), "a 7B model with dynamic tanh", features_last=True, level="thorough")


QUICK = (
    Case("batch", (8, 64, 56, 56), "ResNet-50, stage 1, batch 8", activation="relu", level="quick"),
    Case("batch", (8, 256, 28, 28), "a ResNet block's end", activation="relu", residual=True, level="quick"),
    Case("instance", (8, 64, 56, 56), "a 6 MB image tensor", level="quick"),
    Case("group:32", (2, 320, 64, 64), "U-Net of latent diffusion", activation="silu", level="quick"),
    Case("layer", (16, 197, 768), "ViT-B/16, batch 16", features_last=True, level="quick"),
    Case("rms", (512, 4096), "a 7B model, 512 tokens", features_last=True, level="quick"),
)
DEFAULT = (*_resnet(32, "default"), *_images(), *_groups(), *_rows())
THOROUGH = (*_resnet(1, "thorough"), *_resnet(8, "thorough"))
CASES: tuple[Case, ...] = (*QUICK, *DEFAULT, *THOROUGH)


def names() -> list[str]:
    """Every op, in the order of the cases."""
    return list(dict.fromkeys(case.op for case in CASES))


def choose(level: Level, ops: Sequence[str] = (), shapes: Sequence[tuple[int, ...]] = ()) -> list[Case]:
    """The cases of a level whose op fits one of the patterns, on these shapes.

    Quick stands alone; thorough contains default. A shape that no case of an op has becomes a case of its own: whoever
    asks for it by name knows why.

    Raises:
        ValueError: no case fits.
    """
    wanted = [op for op in names() if not ops or any(fnmatchcase(op, pattern) for pattern in ops)]
    if not wanted:
        raise ValueError(f"no op fits {', '.join(map(repr, ops))}.\n  choose from: {', '.join(names())}")
    if shapes:
        return [_on(op, shape) for op in wanted for shape in shapes if _fits(op, shape)] or _no_shape(wanted, shapes)
    allowed = ("quick",) if level == "quick" else LEVELS[1 : LEVELS.index(level) + 1]
    chosen = [case for case in CASES if case.op in wanted and case.level in allowed]
    if not chosen and level == "quick":  # an op that quick leaves out: its smallest case
        chosen = [min((c for c in CASES if c.op == op), key=lambda case: prod(case.shape)) for op in wanted]
    return chosen


def _on(op: str, shape: tuple[int, ...]) -> Case:
    known = [case for case in CASES if case.op == op]
    for case in known:
        if case.shape == shape:
            return case
    return replace(known[0], shape=shape, reason="asked for on the command line")


def _fits(op: str, shape: tuple[int, ...]) -> bool:
    """Whether the op can run on this number of axes."""
    case = next(case for case in CASES if case.op == op)
    axes = len(shape)
    if case.features_last:
        return axes >= 2
    if case.norm.startswith("group"):
        return 3 <= axes <= 5 and shape[1] % int(case.norm.partition(":")[2]) == 0
    return axes >= (2 if case.norm == "batch" else 3) and axes <= 5


def _no_shape(ops: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Case]:
    listed = ", ".join("x".join(map(str, shape)) for shape in shapes)
    raise ValueError(
        f"{', '.join(ops)}: cannot run on {listed}.\n"
        "  group norm needs channels that divide into its groups; instance norm n,c,h,w; layer norm n,c at least"
    )
