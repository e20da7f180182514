"""Two forward passes before one backward pass, under DDP, with buffers."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, typical, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    forward, backward = typical(evidence, "forward_passes"), typical(evidence, "backward_passes")
    processes = evidence.number("processes") or 0.0
    norms = [
        module
        for module, keeps in evidence.numbers("keeps_statistics")
        if keeps and not evidence.word("class_name", module).startswith("normkit.")
    ]
    if forward is None or backward is None or forward <= max(backward, 1.0):
        return
    if processes < 2 or not evidence.number("buffers_overwritten") or not norms:
        return
    yield Finding(
        RULE.name,
        "warning",
        f"{forward:.0f} forward passes for {backward:.0f} backward {'pass' if backward == 1 else 'passes'} in "
        f"{processes:.0f} processes with {several(len(norms), 'batch norm')} ({where(norms)}): DDP "
        "writes the buffers of rank 0 over those that the first pass has saved",
        tuple(norms),
        "forward_passes",
        forward,
        backward,
        "as many forward as backward passes",
        prescriptions=(
            Prescription(
                "buffers are not broadcast",
                "",
                "nothing is written between forward and backward; merge before saving",
                "train_identical",
                by_hand="DistributedDataParallel(model, broadcast_buffers=False)  # and nk.merge_statistics_(model) "
                "before saving",
            ),
            Prescription(
                "batch norms keep what they have saved",
                "",
                "normkit's save copies of the running statistics, so nothing is written over",
                "identical",
                operation="accelerate_",
            ),
        ),
        check="no 'modified by an inplace operation' in the backward pass",
    )


RULE = Rule(
    "forward_twice_before_backward",
    frozenset({"forward_passes", "backward_passes", "buffers_overwritten", "keeps_statistics", "processes"}),
    "More forward than backward passes per step, under DistributedDataParallel that broadcasts buffers, in a model "
    "with running statistics, and in a torch that does not hide this from autograd (2.13 does).",
    "DDP broadcasts buffers before each forward pass. The second one writes over what the first has saved for its "
    "backward pass, and torch's batch norm then ends the training with an error about an in-place operation. The step "
    "that was not finished is what the report of the watched run shows.",
    "Nobody uses what the extra pass gives, so it has no backward pass to spoil.",
    ("https://github.com/pytorch/pytorch/issues/175024", "https://github.com/pytorch/pytorch/issues/65907"),
    find,
)
