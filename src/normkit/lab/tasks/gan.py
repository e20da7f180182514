"""gan: two networks that learn from each other, with a norm in either of them, on a ring of normals or on digits."""

from __future__ import annotations

from normkit.lab.adversarial.drawn_digits import drawn_digits
from normkit.lab.adversarial.networks import take_step
from normkit.lab.adversarial.quality import distance_of_means
from normkit.lab.adversarial.ring import ring
from normkit.lab.errors import LabError
from normkit.lab.experiment import Experiment

ARMS = (
    "none",
    "batch+side:generator",
    "batch+side:discriminator",
    "batch+side:discriminator+statistics:mixed",
    "batch",
    "batch:virtual+side:generator",
    "none+spectral:discriminator",
)
DATA = ("ring", "digits")
ADAM = {"betas": (0.5, 0.999), "weight_decay": 0.0, "fused": True}  # Radford et al. 2016; without decay AdamW is Adam
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # seven: two thirds of a comparison are its search
WORDS = (
    "An arm's norm stands in both networks, or with side:generator or side:discriminator in one. The discriminator "
    "sees real and generated samples in batches of their own, or with statistics:mixed in one; "
    "spectral:discriminator divides its weights by their largest singular values. Every step is one of the "
    "discriminator and one of the generator (the loss that does not saturate) with Adam (0.5, 0.999) and fresh "
    "noise. A mode is covered when a fifth of its fair share of the samples lies in it; a run has collapsed when "
    "fewer than half of the modes are."
)


def gan(data: str = "ring", width: int = 64) -> Experiment:
    """Perceptrons of `width` on a ring of 8 normal distributions; data=digits: DCGAN of an eighth of it."""
    if data not in DATA:
        raise LabError(f"gan with data {data!r}; choose {' or '.join(DATA)}")
    own = {
        "ring": lambda **shared: ring(width, **shared),
        "digits": lambda **shared: drawn_digits(max(4, width // 8), **shared),
    }
    return own[data](
        words=WORDS,
        name="gan",
        loss=distance_of_means,
        arms=ARMS,
        optimizer="adamw",
        optimizer_options=ADAM,
        rates=RATES,
        update=take_step,
    )
