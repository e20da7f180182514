"""Running statistics in half precision: an average that stalls, and variances that overflow."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

DIGITS = {"float16": 11, "bfloat16": 8}
"""Binary digits that a number of this type has."""


def find(evidence: Evidence) -> Iterator[Finding]:
    narrow = [module for module in evidence.modules("statistics_dtype") if _type(evidence, module) in DIGITS]
    if not narrow:
        return
    kind = _type(evidence, narrow[0])
    training = any(evidence.number("in_training", module) for module in narrow)
    momentum = evidence.number("momentum", narrow[0]) or 0.1
    least = 2.0 ** -DIGITS[kind] / momentum
    yield Finding(
        RULE.name,
        "error" if training else "note",
        f"{several(len(narrow), 'norm', 'keeps its', 'keep their')} running statistics in {kind} ({where(narrow)}): "
        f"with momentum {momentum:g} a difference below {least:.0%} of the value no longer moves them",
        tuple(narrow),
        "statistics_dtype",
        kind,
        "float32",
        f"{DIGITS[kind]} binary digits",
        prescriptions=(
            Prescription(
                "running statistics become float32",
                "",
                "averages need more digits than activations",
                "retrain",
                by_hand="for module in model.modules():\n"
                "    if isinstance(module, torch.nn.modules.batchnorm._NormBase):\n"
                "        module.float()  # or nk.accelerate_(model) before model.half(): normkit's layers stay float32",
            ),
        ),
        check="print({buffer.dtype for buffer in model.buffers()})",
    )


def _type(evidence: Evidence, module: str) -> str:
    return evidence.word("statistics_dtype", module)


RULE = Rule(
    "half_precision_statistics",
    frozenset({"statistics_dtype"}),
    "Running mean or variance of type float16 or bfloat16.",
    "Each batch moves the average by momentum times a difference; what is less than half of the last digit is lost, "
    "and the average stands still. In float16 a variance above 65504 is infinite.",
    "In a model that is only evaluated the statistics no longer move, and rounding them once does little.",
    (
        "https://github.com/Lightning-AI/pytorch-lightning/issues/18802",
        "https://github.com/facebookresearch/fairscale/issues/442",
    ),
    find,
)
