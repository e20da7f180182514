"""Deep residual networks whose branches do not start at 0."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

BLOCKS = 16


def find(evidence: Evidence) -> Iterator[Finding]:
    ends = [module for module, yes in evidence.numbers("ends_branch") if yes]
    fresh = [module for module in ends if not evidence.number("batches_seen", module)]
    opened = [module for module in fresh if evidence.number("scale_least", module) == 1.0]
    if len(ends) < BLOCKS or not opened or len(fresh) < len(ends):
        return
    yield Finding(
        RULE.name,
        "note",
        f"the last norm of {len(opened)} residual branches starts with scale 1 ({where(opened)}): starting "
        f"at 0, each block is the identity at first, which helps at large batches and {len(ends)} blocks",
        tuple(opened),
        "scale_least",
        1.0,
        0.0,
        f"Goyal et al. 2017; from {BLOCKS} blocks on (ResNet-50)",
        prescriptions=(
            Prescription(
                "the last norm of every branch starts at scale 0",
                "",
                "the network begins as a shallow one",
                "retrain",
                by_hand="for name in report.findings[0].modules:\n"
                "    torch.nn.init.zeros_(model.get_submodule(name).weight)",
                arms="batch,batch+zero_init:1",
            ),
        ),
        check="nk.diagnose(model, select='residual_branches_start_open')",
    )


RULE = Rule(
    "residual_branches_start_open",
    frozenset({"ends_branch", "scale_least"}),
    "An untrained residual network of 16 blocks or more whose branches end in a norm with scale 1.",
    "Every block adds its variance to the stream; with scale 0 the stream passes through at first, and the early steps "
    "with a large learning rate are calmer.",
    "A network that is about to load a checkpoint. It is an improvement of tenths of a percent, not a repair.",
    ("Goyal et al. 2017, arXiv:1706.02677, section 5.1", "He et al. 2019, arXiv:1812.01187"),
    find,
)
