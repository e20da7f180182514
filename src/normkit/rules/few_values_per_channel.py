"""Batch norms that estimate mean and variance from too few samples."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

NOISE = 0.25
"""Standard error of the mean of 16 independent values, in deviations."""
SOURCE = "16 independent values; docs/small-batches.md: from 16 on, plain batch norm is not beaten"
CERTAIN = 2
"""With two values the output is +1 and -1, whatever came in; with one torch refuses."""


def find(evidence: Evidence) -> Iterator[Finding]:
    normalising = [
        module
        for module, _ in evidence.numbers("values_per_channel")
        if evidence.word("kind", module) == "batch_norm" and not evidence.number("frozen", module)
    ]
    values = {module: evidence.number("values_per_channel", module) or 0.0 for module in normalising}
    crashing = [module for module, count in values.items() if count <= CERTAIN]
    noise = {module: evidence.number("batch_noise", module) or 0.0 for module in normalising}
    noisy = [module for module, share in noise.items() if share > NOISE]
    if crashing:
        least = min(values[module] for module in crashing)
        says = "torch refuses to train on it" if least <= 1 else "the output is +1 and -1 whatever comes in"
        yield Finding(
            RULE.name,
            "error",
            f"{several(len(crashing), 'batch norm', 'sees', 'see')} {several(int(least), 'value')} per channel "
            f"({where(crashing)}): {says}",
            tuple(crashing),
            "values_per_channel",
            least,
            float(CERTAIN + 1),
            "a variance takes more than two values",
            prescriptions=_prescriptions(crashing[0]),
            check="the last batch of an epoch: len(dataset) % batch_size",
        )
    elif noisy:
        worst = max(noisy, key=lambda module: noise[module])
        yield Finding(
            RULE.name,
            "warning",
            f"{several(len(noisy), 'batch norm', 'estimates', 'estimate')} a mean that is wrong by "
            f"{noise[worst]:.2g} deviations on this batch ({where([worst, *(n for n in noisy if n != worst)])})",
            (worst, *(module for module in noisy if module != worst)),
            "batch_noise",
            noise[worst],
            NOISE,
            SOURCE,
            prescriptions=_prescriptions(worst),
            check="normkit compare with --norms batch,group:auto at this batch size",
        )


def _prescriptions(module: str) -> tuple[Prescription, ...]:
    return (
        Prescription(
            "larger batches",
            "",
            "the error falls with the root of the number of samples",
            "retrain",
            by_hand="DataLoader(..., batch_size=32, drop_last=True)  # or nk.sync_(model) over several processes",
        ),
        Prescription(
            "batch norm becomes group norm",
            module,
            "group norm does not look at other samples",
            "retrain",
            operation="convert_",
            options=(("to", "group:auto"),),
        ),
    )


RULE = Rule(
    "few_values_per_channel",
    frozenset({"values_per_channel", "kind"}),
    "A batch norm with one or two values per channel, or whose batch mean has a standard error above a quarter "
    "deviation.",
    "Every sample is shifted by the luck of its neighbours, and running statistics average over noise. A last batch of "
    "one sample raises 'Expected more than 1 value per channel'.",
    "The batch given here is smaller than the one in training. Noise of this kind also regularises, and some want it.",
    (
        "https://github.com/scverse/scvi-tools/issues/2314",
        "https://github.com/fastai/fastai/issues/1352",
        "Wu & He 2018, arXiv:1803.08494",
        "docs/small-batches.md",
    ),
    find,
)
