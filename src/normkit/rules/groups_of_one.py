"""Norms that share a mean among a single value: their output is their bias, whatever comes in."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

KINDS = ("group_norm", "instance_norm", "layer_norm")


def find(evidence: Evidence) -> Iterator[Finding]:
    places = [
        module
        for module, values in evidence.numbers("values_per_channel")
        if values <= 1 and evidence.word("kind", module) in KINDS
    ]
    if not places:
        return
    kinds = {evidence.word("kind", place).replace("_", " ") for place in places}
    groups = evidence.number("groups", places[0])
    fewer = f"a divisor of {evidence.number('channels', places[0]):.0f} below {groups:.0f}" if groups else "more values"
    yield Finding(
        RULE.name,
        "error",
        f"{several(len(places), ' or '.join(sorted(kinds)), 'normalises', 'normalise')} single values "
        f"({where(places)}): the output is the bias, whatever comes in, and no gradient passes",
        tuple(places),
        "values_per_channel",
        1.0,
        2.0,
        "the mean of one value is that value",
        prescriptions=(
            Prescription(
                "more values share a mean",
                places[0],
                "something of the input is left",
                "retrain",
                operation="convert_",
                options=(("to", "layer"),),
            ),
            Prescription(
                "fewer groups",
                places[0],
                "each group holds several channels",
                "retrain",
                by_hand=f"# num_groups: {fewer}",
            ),
        ),
        check="nk.diagnose(model, batch, select='groups_of_one')",
    )


RULE = Rule(
    "groups_of_one",
    frozenset({"values_per_channel", "kind"}),
    "A group, instance or layer norm whose groups hold one value each on this batch.",
    "x - mean(x) is 0. GroupNorm(c, c) on vectors, or instance norm on a map of 1 x 1, gives its bias; training stops "
    "in silence, because everything before it gets no gradient.",
    "A map that shrinks to 1 x 1 only for inputs smaller than those in use.",
    ("https://github.com/pytorch/opacus/issues/567",),
    find,
)
