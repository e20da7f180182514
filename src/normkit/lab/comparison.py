"""`normkit.lab.compare`: the Python twin of the command `normkit compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.lab.arm import Arm, parse_arms
from normkit.lab.build import check_arms
from normkit.lab.cell import Cell
from normkit.lab.data import Data, Order, fingerprint
from normkit.lab.directory import default_directory, open_directory
from normkit.lab.errors import LabError
from normkit.lab.experiment import ACCURACY, Experiment
from normkit.lab.knob import Sweep, make_sweep, parse_sweep
from normkit.lab.load import InMemory, Source, describe
from normkit.lab.parallel import parse_parallel
from normkit.lab.recipe import BUDGETS, FIRST_SEARCH_SEED, LEAST_RATES, Budget, Recipe, middle
from normkit.lab.run import Engine, Nobody, Watcher
from normkit.lab.worker import SETTLED, seeded_data


@dataclass(frozen=True)
class Result:
    """Where a comparison lies, and what it found: `summary` is the content of summary.json."""

    directory: Path
    summary: dict[str, Any]
    page: Path

    @property
    def answer(self) -> str:
        """The answer in words."""
        from normkit.report.words import verdict

        return verdict(self.summary)


def compare(
    task: str | Experiment | Callable[..., Experiment] = "digits",
    *,
    arms: str | Iterable[str | Arm] | None = None,
    norms: str | Iterable[str] | None = None,
    sweep: str | tuple[str, Iterable[Any]] | None = None,
    budget: str = "default",
    seeds: int | None = None,
    search_seeds: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    target: float | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    parallel: str | int = "loky",
    checkpoint_seconds: float = 2.0,
    watcher: Watcher | None = None,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Trains a network with and without normalization, each arm at its own best learning rate, and analyses the runs.

    task: a built-in task, "exp.py:function", "package.module:function", an `Experiment`, or a function that returns
    one. norms is the shorthand for arms. budget: "quick", "default" or "thorough". options: arguments of the
    task's function, e.g. {"depth": 20}. The same call again resumes. Raises LabError for what cannot be done as asked.
    """
    if norms is not None and arms is not None:
        raise LabError("norms and arms are both given; norms is the shorthand for arms, give one of them")
    source = _source(task)
    options = dict(options or {}) | ({"data": str(data)} if data is not None else {})
    swept = parse_sweep(sweep) if isinstance(sweep, str) else make_sweep(*sweep) if sweep else None
    experiment = source.load(options)
    asked = arms if arms is not None else norms if norms is not None else usual_arms(experiment, budget)
    chosen = parse_arms(asked)
    workers = parse_parallel(str(parallel))
    splits, data_hash = _first_data(experiment)
    recipe = make_recipe(
        source,
        experiment,
        chosen,
        _budget(budget),
        swept,
        options,
        data_hash,
        seeds,
        steps,
        batch_size,
        target,
        search_seeds,
    )
    _check(source, recipe, len(splits.train))
    directory = Path(out) if out is not None else default_directory(recipe)
    sizes = {name: len(split) for name, split in splits._asdict().items()}
    call = command or _call(recipe)
    here = open_directory(directory, recipe, experiment, sizes, workers, call)
    Engine(recipe, source, experiment.metric, directory, workers, here, watcher or Nobody(), checkpoint_seconds).go()
    return conclude(directory)


def conclude(directory: Path) -> Result:
    """Analyses a run directory and writes its page; LabError when not one run came to an end."""
    from normkit import report
    from normkit.lab.analyse import analyse

    runs = analyse(directory)["runs"]
    if not any(run["state"] in SETTLED for run in runs):
        reason = next((run["reason"] for run in runs if run["state"] == "failed"), "unknown")
        raise LabError(
            f"all {len(runs)} runs failed, the first with: {reason}. The traceback of each is in the status.json of "
            f"its cell in {directory / 'cells'}; correct the model or the data and type the same command again"
        )
    return Result(directory, report.read_summary(directory), report.write(directory))


def usual_arms(experiment: Experiment, budget: str) -> tuple[str | Arm, ...]:
    """Those of a comparison that names none."""
    return tuple((experiment.quick_arms if budget == "quick" else None) or experiment.arms)


def make_recipe(
    source: Source,
    experiment: Experiment,
    arms: tuple[Arm, ...],
    budget: Budget,
    sweep: Sweep | None,
    options: Mapping[str, Any],
    data: str,
    seeds: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    target: float | None = None,
    search_seeds: int | None = None,
) -> Recipe:
    """The question, from an experiment, a budget and what the person wants otherwise."""
    for name, number in (
        ("seeds", seeds),
        ("search-seeds", search_seeds),
        ("steps", steps),
        ("batch-size", batch_size),
    ):
        if number is not None and number < 1:
            raise LabError(f"--{name} {number}: give a whole number from 1")
    if target is not None and experiment.metric == ACCURACY and not 0 <= target <= 1:
        raise LabError(
            f"--target {target:g}: accuracy is a fraction between 0 and 1, and no run could reach that; for "
            f"{target:g} % write --target {target / 100:g}"
        )
    quick = budget.name == "quick" and experiment.quick_steps is not None
    wanted = steps or (experiment.quick_steps if quick else None) or experiment.steps
    return Recipe(
        name=experiment.name,
        task=source.reference,
        arms=arms,
        baseline=_baseline(experiment, arms),
        optimizer=experiment.optimizer,
        budget=budget.name,
        rates=middle(_rates(experiment), budget.rates),
        search_seeds=tuple(range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + (search_seeds or budget.search_seeds))),
        seeds=tuple(range(seeds or budget.seeds)),
        steps=wanted,
        eval_every=min(experiment.eval_every, wanted),
        batch_size=batch_size or experiment.batch_size,
        target=experiment.target if target is None else target,
        data=data,
        code=source.code(),
        options=dict(options),
        sweep=sweep,
    )


def _source(task: str | Experiment | Callable[..., Experiment]) -> Source:
    if isinstance(task, str):
        return Source(task)
    if isinstance(task, Experiment):
        return Source(task.name, InMemory(task))
    return Source(getattr(task, "__name__", "experiment"), task)


def _first_data(experiment: Experiment) -> tuple[Data, str]:
    """The data of the first search seed and their fingerprint; what a person's own code raises is said once, here."""
    try:
        splits = seeded_data(experiment, FIRST_SEARCH_SEED)
        return splits, fingerprint(splits)
    except LabError:
        raise
    except Exception as error:
        raise LabError(
            f"the data of {experiment.name} raised {describe(error)}; correct the function or the dataset"
        ) from error


def _budget(name: str) -> Budget:
    if name not in BUDGETS:
        raise LabError(f"unknown budget {name!r}; choose {', '.join(BUDGETS)}")
    return BUDGETS[name]


def _baseline(experiment: Experiment, arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    if experiment.baseline is None or experiment.baseline not in names:
        return next((arm.name for arm in arms if arm.norm.lower() in ("none", "identity")), names[0])
    return experiment.baseline


def _rates(experiment: Experiment) -> tuple[float, ...]:
    rates = tuple(sorted(set(experiment.rates)))
    if len(rates) < LEAST_RATES or rates[0] <= 0:
        raise LabError(
            f"{experiment.name} gives {len(rates)} learning rates {rates}; each arm's best rate is looked for on a "
            f"grid of at least {LEAST_RATES} positive, log-spaced values"
        )
    return rates


def _check(source: Source, recipe: Recipe, samples: int) -> None:
    """Builds every network once, at every value of the knob: what cannot be built is said before training."""
    for value in recipe.values:
        seed, rate = recipe.search_seeds[:1], recipe.rates[:1]
        cells = [cell for cell in recipe.search_cells(rate, value, threads=1) if cell.seed in seed]
        Order(samples, cells[0].batch_size, seed=0)
        _check_parts(cells)
        check_arms(source.load(cells[0].options), tuple(cell.trained_arm for cell in cells))


def _check_parts(cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell.batch_size % cell.arm.processes:
            raise LabError(
                f"arm {cell.arm.name!r}: a batch of {cell.batch_size} samples cannot be cut into "
                f"{cell.arm.processes} equal parts; choose a batch size that {cell.arm.processes} divides"
            )


def _call(recipe: Recipe) -> str:
    arms = ", ".join(repr(arm.name) for arm in recipe.arms)
    sweep = f", sweep=({recipe.sweep.knob!r}, {list(recipe.sweep.values)})" if recipe.sweep else ""
    options = f", options={dict(recipe.options)!r}" if recipe.options else ""
    return f"normkit.lab.compare({recipe.task!r}, arms=[{arms}], budget={recipe.budget!r}{sweep}{options})"
