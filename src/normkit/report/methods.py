"""How each number is computed: the text at the end of every page. docs/reading-the-page.md tells it at length."""

from __future__ import annotations

from typing import Any

GENERATED = """
    The generator in evaluation makes as many samples as there are test samples, from noise that is the same in every
    arm and run. Modes covered and collapsed: as the description says. Loss variance: of the discriminator's loss over
    the steps of the second half of the run. Real against real: the metric of as many real samples of the training data
    against the test data, which no generator can be expected to beat."""
BY_TIME_STEP = """
    The derivative of the loss by the state h_t of the last recurrent layer, all samples of the batch together, by way
    of the output and of all later states: its Euclidean norm, with the weights that the training step has left, on the
    batch of that step, in training mode. Median of the seeds."""
FOLDED = """
    After a final run a batch of validation samples, of the size of a training batch, goes through the network in
    evaluation: as training left it, and with its norms folded into the layers beside them (normkit.fold; PRepBN is
    settled first), in turns. The milliseconds are medians over the runs of medians of up to 20 batches; how many times
    as fast is the median of the ratios within a run. Norms that keep no statistics, as layer and RMS norm, stay. Fold
    error is the greatest difference of the outputs for up to 512 test samples over their greatest value, the greatest
    over the runs."""


def methods(summary: dict[str, Any]) -> dict[str, str]:
    """Term -> definition, with this experiment's own numbers in it."""
    experiment, statistics = summary["experiment"], summary["statistics"]
    rates = experiment.get("rates") or {}
    terms = {
        "Steps and seconds to the target": f"""
            The optimizer steps taken, and the seconds spent in training steps, when the metric on validation data
            is first at the target or beyond it. It is evaluated every {experiment.get("eval_every")} steps, so no
            number is finer than that; evaluation is not in the seconds. The table shows the median of
            {len(experiment["seeds"])} seeds.""",
        "Censored runs": """
            A run that never reaches the target is kept as one that takes longer than its budget. The median is
            exact as long as more than half of the runs arrive. A run that diverged before the target has not
            arrived. Only a run that crashed has no outcome: it is left out, and counted as failed.""",
        "Fewer steps, less time": """
            Every seed gives one ratio, baseline divided by arm (same split, same batch order, same initial
            weights); the table shows their median, for an even number the geometric mean of the middle two. It need
            not equal the quotient of the two medians. Where one run of a pair did not arrive, the ratio is only
            known to lie beyond budget divided by the other run; such bounds take part in the median and in the
            interval, an end that they leave open is ∞, and a median that is itself a bound is written > or “more
            than”. An arm that arrives in half of its runs or fewer gets no ratio.""",
        "Intervals": f"""
            In brackets, {100 * statistics["level"]:.0f} %: expanded percentile bootstrap over (paired) seeds,
            {statistics["resamples"]} resamples with a fixed seed (Hesterberg 2015). “Not distinguishable” means
            that the interval of the ratio includes 1, or that of the difference includes 0. Several arms are
            compared with one baseline, and the intervals are not widened for that.""",
        "Final test metric": """
            The metric on test data at the end of a run, which nothing looks at before; mean over seeds. The
            difference to the baseline is paired by seed. A diverged run has no test value and is counted under
            diverged.""",
        "Learning rates": f"""
            Every arm has the same logarithmic grid and the same {len(rates.get("seeds", []))} search seeds, which
            no final run uses. When the best rate lies on an edge, the grid is extended by at most
            {rates.get("extensions", 0)} steps that way. Usable: more than half of the search runs at a rate reach
            the target within the budget; stable: more than half do not diverge or fail. The widest stretch of
            neighbouring rates counts, as log10(highest / lowest) decades; ≥ where the grid ended first.""",
        "Cost": """
            Milliseconds per step is the median duration of an optimizer step; share in norms the part spent in
            normalization layers, measured on extra steps after the run, back to back and with identities in their
            place, so it need not agree to the percent with the difference between two arms; memory the greatest
            resident memory of the process. CPU milliseconds are those of the processor, of all processes of a run
            together: waiting and other programs are not in them. All are medians over final runs, taken while as many
            runs went on at once as the environment says.""",
        "Curves": """
            The line is the median of the seeds, the band reaches from the worst to the best seed. A run that
            diverged is drawn to its last finite value (×). By seconds, each point stands at the median seconds of
            its step.""",
        "Statistics at test time": """
            Exact: the training set (at most 1024 samples) goes through the trained network as one batch, each
            batch norm takes the mean and variance of what reaches it, and the test data are evaluated with those.
            Test batch: in evaluation, but for the norms, which normalise each part of the test data, of the size of
            a training batch or a little more, by itself. A moving-average norm takes mean squares in both.""",
        "Dead units, variance ratio": """
            Dead units: share of ReLU units that are zero on the whole test set. Variance ratio: with dropout, the
            variance of a norm layer's input in evaluation over that in training, lowest and highest over the
            layers.""",
    }
    if any(arm.get("measures") for point in summary["points"] for arm in point["arms"]):
        terms["What is generated"] = GENERATED
    if any(arm.get("state_gradients") for point in summary["points"] for arm in point["arms"]):
        terms["Gradient by time step"] = BY_TIME_STEP
    if any(arm.get("folding") for point in summary["points"] for arm in point["arms"]):
        terms["In evaluation, folded"] = FOLDED
    return {term: " ".join(text.split()) for term, text in terms.items()}
