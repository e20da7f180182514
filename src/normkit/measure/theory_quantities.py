"""The quantities of the theory probes. Beside them, because whoever packs readings knows every quantity."""

from __future__ import annotations

from normkit.vocabulary.quantity import Quantity

_SANTURKAR = "Santurkar et al. 2018, arXiv:1805.11604"
_YANG = "Yang et al. 2019, arXiv:1902.08129"

QUANTITIES = (
    Quantity(
        "internal_covariate_shift",
        "probe",
        "",
        "||G - G'||, G: gradient of a layer's parameters; G': the same after one gradient step of all earlier layers",
        _SANTURKAR,
        means="How much a step of the earlier layers changes the gradient of a layer.",
    ),
    Quantity(
        "gradient_cosine",
        "probe",
        "",
        "<G, G'> / (||G|| ||G'||), as internal_covariate_shift",
        _SANTURKAR,
        means="Whether the gradient of a layer points the same way after a step of the earlier layers.",
    ),
    Quantity(
        "loss_range",
        "probe",
        "loss",
        "max - min of L(w - t g) over steps t; 1/2 to 4 times the learning rate",
        _SANTURKAR,
        per="model",
        means="How much the loss varies along its gradient.",
    ),
    Quantity(
        "relative_loss",
        "probe",
        "",
        "max of L(w - t g) over steps t / L(w); above 1000 training diverges",
        "Bjorck et al. 2018, arXiv:1806.02375",
        per="model",
        means="How much a step along the gradient can worsen the loss.",
    ),
    Quantity(
        "gradient_predictiveness",
        "probe",
        "",
        "max over steps t of ||∇L(w - t g) - ∇L(w)||",
        _SANTURKAR,
        per="model",
        means="How much the gradient changes along itself.",
    ),
    Quantity(
        "effective_smoothness",
        "probe",
        "",
        "max over steps t of ||∇L(w - t g) - ∇L(w)|| / ||t g||",
        _SANTURKAR,
        per="model",
        means="The greatest curvature that is met along the gradient.",
    ),
    Quantity(
        "activation_drift",
        "probe",
        "deviations",
        "mean over units of |mean after one gradient step - mean| / std, of what comes out of an activation",
        "Ioffe & Szegedy 2015, arXiv:1502.03167",
        means="How far one step of training moves what comes out of an activation.",
    ),
    Quantity(
        "output_gradient_norm",
        "probe",
        "",
        "||dL/dy||, y: what comes out of an activation",
        _YANG,
        means="The length of the gradient that reaches what comes out of an activation.",
    ),
    Quantity(
        "explosion_rate",
        "probe",
        "per layer",
        "factor on ||dL/dy||² per activation towards the input: least squares on the logarithm; at initialisation, "
        "π / (π - 1) = 1.467 for batch norm with ReLU on large batches",
        _YANG,
        per="model",
        means="By which factor squared gradients grow per layer on their way to the input, before training.",
    ),
)
