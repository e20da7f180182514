"""Batch norm over (n, length, features): it takes positions for channels."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    places = evidence.modules("features_last_before")
    if not places:
        return
    first = places[0]
    producer = evidence.word("features_last_before", first)
    yield Finding(
        RULE.name,
        "error",
        f"{several(len(places), 'norm', 'takes', 'take')} axis 1 for channels where the features are the last axis "
        f"({where(places)}, after {producer}): positions are normalised, and it runs only because both are equally "
        "many",
        tuple(places),
        "features_last_before",
        producer,
        "",
        "channels of torch's batch norm are axis 1",
        prescriptions=(
            Prescription(
                "the features become axis 1 around the norm",
                first,
                "each feature is normalised over samples and positions",
                "retrain",
                by_hand="x = norm(x.transpose(1, 2)).transpose(1, 2)  # x: (n, length, features)",
            ),
        ),
        check="a sequence of another length raises no error",
    )


RULE = Rule(
    "channels_on_wrong_axis",
    frozenset({"features_last_before"}),
    "BatchNorm1d or InstanceNorm1d on the output of a layer that computes features along the last axis.",
    "torch takes axis 1 of three for channels. After a linear layer, an embedding or a recurrent network that is the "
    "position in the sequence. Where length and features are equal nothing raises, and each position gets a scale.",
    "Positions that are meant to be channels (a table with as many columns as features).",
    (
        "https://github.com/pytorch/pytorch/issues/76613",
        "https://github.com/pytorch/pytorch/issues/7577",
        "torch.nn.BatchNorm1d: (n, c, l)",
    ),
    find,
)
