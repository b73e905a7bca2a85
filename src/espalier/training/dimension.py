"""How small a random subspace may be that still learns a task: its intrinsic dimension, d90.

Aghajanyan et al. 2020 (arXiv 2012.13255): full tuning is trained once, then SAID with more and more
scalars, until one reaches 90 % of full tuning's validation score. Each training is an ordinary run
in a folder of its own: what is finished is kept, and a stopped sweep goes on where it was.

    folder/full, folder/d512, …    the runs           dimension.md     the table
    dimension.json                 what came of it    dimension.png    score over dimension
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.container import write_text
from espalier.errors import SettingError
from espalier.recipes import recipe
from espalier.training import plot
from espalier.training.config import DECISIVE, RunConfig
from espalier.training.logs import quiet
from espalier.training.progress import Screen
from espalier.training.result import RunResult
from espalier.training.run import train

DIMENSIONS = tuple(500 * 2**k for k in range(8))  # 500 … 64,000


@dataclass(frozen=True)
class Trial:
    """One run: how many scalars trained (beside the head), its validation score, its seconds."""

    dimension: int
    score: float
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        metric: The task's main metric, on validation data.
        goal: Whether "max" or "min" of it is best.
        share: Which share of full tuning's score is asked for.
        full: Full tuning's score.
        target: The score to reach: share · full, of a metric to be lowered full / share.
        trials: In the order of their dimensions.
        found: The smallest dimension tried that reaches the target; None if none does.
    """

    metric: str
    goal: str
    share: float
    full: float
    target: float
    trials: tuple[Trial, ...]
    found: int | None

    @property
    def titles(self) -> tuple[str, str, str]:
        """What stands in the columns of `rows`."""
        return "scalars trained", self.metric, "of full tuning's"

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """A table's rows as text: each trial, then full tuning."""
        trials = [
            (f"{t.dimension:,}", f"{t.score:.4g}", f"{t.score / self.full:.1%}")
            for t in self.trials
        ]
        return [*trials, ("full tuning", f"{self.full:.4g}", "")]

    def __str__(self) -> str:
        if self.found is None:
            tried = max((trial.dimension for trial in self.trials), default=0)
            return f"no dimension up to {tried:,} reaches {self.metric} {self.target:.4g}"
        below = [trial.dimension for trial in self.trials if trial.dimension < self.found]
        since = f"above {max(below):,}, at most {self.found:,}" if below else f"≤ {self.found:,}"
        return f"d{100 * self.share:g} is {since} ({self.metric} {self.target:.4g} or better)"


def intrinsic_dimension(
    config: RunConfig,
    dimensions: Sequence[int] = DIMENSIONS,
    *,
    share: float = 0.9,
    full_score: float | None = None,
    full_lr: float | None = None,
    structure: bool = True,
    every: bool = False,
) -> Sweep:
    """Train full tuning and SAID in growing dimensions until one is as good as asked.

    Args:
        config: The settings of every run but its method; `out` is the sweep's folder
            (runs/dimension if left out), `lr` SAID's learning rate, its own if left out.
        dimensions: Scalars to train, tried in ascending order.
        share: The share of full tuning's score to reach.
        full_score: That score, if it is known: full tuning is not trained then.
        full_lr: Full tuning's learning rate, its own if left out.
        structure: A factor per tensor (SAID), or the directions alone (DID).
        every: Go on after the target is reached.

    Raises:
        SettingError: A setting is wrong, there is no validation data, the folder holds runs with
            other settings, or full tuning's score is not above 0.
    """
    wanted = sorted(set(dimensions))
    if not wanted or wanted[0] < 1:
        raise SettingError(f"dimensions are whole numbers of at least 1, not {list(dimensions)}")
    if not 0 < share <= 1:
        raise SettingError(f"share={share!r}: above 0 and at most 1")
    if config.dry_run or not (config.validation or config.validation_share):
        raise SettingError("a sweep needs validation data, and is no dry_run")
    folder, screen = config.out or Path("runs/dimension"), Screen(config.quiet)
    full = full_score

    def trial(dimension: int) -> _Ran:
        method = f"IntrinsicSAID(dimension={dimension}, seed={config.seed}, structure={structure})"
        return _run(config, method, folder / f"d{dimension}", screen)

    if full is not None:
        _check_full(full)
    ran = trial(wanted[0])  # first, as it is the cheapest way to learn of wrong settings
    if full is None:
        full = _run(config.replace(lr=full_lr), "FullTuning()", folder / "full", screen).score
    _check_full(full)
    trials: list[Trial] = []
    while True:
        dimension = wanted[len(trials)]
        ran = trial(dimension) if trials else ran
        trials.append(Trial(dimension, ran.score, ran.seconds))
        sweep = _judged(ran, share, full, trials)
        _write(sweep, folder)
        screen.say(
            f"{dimension:,} scalars: {sweep.metric} {ran.score:.4g}, target {sweep.target:.4g}"
        )
        if len(trials) == len(wanted) or (sweep.found is not None and not every):
            screen.say(f"{sweep}; see {folder}")
            return sweep


def _check_full(score: float) -> None:
    if not score > 0:
        raise SettingError(f"full tuning's score is {score:g}, of which there is no share to reach")


@dataclass(frozen=True)
class _Ran:
    metric: str
    goal: str
    score: float
    seconds: float


def _run(config: RunConfig, method: str, out: Path, screen: Screen) -> _Ran:
    """One run, new, resumed, or read where it is finished, and its validation score."""
    parts = recipe(method)
    config = config.replace(method=parts.to_json(), out=out, resume=False)
    begun = (out / "config.yaml").is_file() and not config.overwrite
    if begun:
        _check_same(config, RunConfig.from_yaml(out / "config.yaml"))
    if begun and (out / "result.json").is_file():
        result = RunResult.read(out)
    else:
        screen.say(f"\n{parts} → {out}")
        saved = begun and (out / "state").is_dir()
        anew = config.overwrite or (begun and not saved)
        result = train(config.replace(resume=saved, overwrite=anew))
    from espalier.tasks import task_class

    task = RunConfig.from_yaml(out / "config.yaml").task
    assert task is not None  # a run notes the task that it found
    metric, goal = task_class(task).best
    if "validation" not in result.metrics:
        raise SettingError(f"the run in {out} has no validation data to compare by")
    return _Ran(metric, goal, result.metrics["validation"][metric], result.seconds)


def _check_same(config: RunConfig, kept: RunConfig) -> None:
    """Raise SettingError where a run that stands there already was made with other settings."""
    for key in DECISIVE:
        mine, other = getattr(config, key), getattr(kept, key)
        filled = key in ("task", "max_length") and mine is None
        if not filled and config.to_dict()[key] != kept.to_dict()[key]:
            raise SettingError(
                f"the run in {config.out} was made with {key} {other!r}, not {mine!r}; choose "
                "another out, or begin anew with overwrite"
            )


def _judged(ran: _Ran, share: float, full: float, trials: Sequence[Trial]) -> Sweep:
    target = full * share if ran.goal == "max" else full / share
    reached = [
        trial.dimension
        for trial in trials
        if (trial.score >= target if ran.goal == "max" else trial.score <= target)
    ]
    return Sweep(
        ran.metric, ran.goal, share, full, target, tuple(trials), min(reached, default=None)
    )


def _write(sweep: Sweep, folder: Path) -> None:
    """The table, the data and, where matplotlib is there, the picture."""
    data: dict[str, Any] = dataclasses.asdict(sweep)
    write_text(folder / "dimension.json", json.dumps(data, indent=1) + "\n")
    seconds = [*(f"{trial.seconds:.0f}" for trial in sweep.trials), ""]
    table = [(*row, took) for row, took in zip(sweep.rows, seconds, strict=True)]
    lines = [f"{sweep}\n", f"| {' | '.join(sweep.titles)} | seconds |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in table]
    write_text(folder / "dimension.md", "\n".join(lines) + "\n")
    if plot.available():
        with quiet(None):
            _draw(sweep, folder / "dimension.png")


def _draw(sweep: Sweep, path: Path) -> None:
    """Score over dimension, with full tuning's and the target as lines."""
    figure = plot.empty(6, 4)
    axes = figure.subplots()
    x = [trial.dimension for trial in sweep.trials]
    axes.plot(x, [trial.score for trial in sweep.trials], "o-", color="#1f5a96", label="subspace")
    axes.axhline(sweep.full, color="#2b7a4b", label="full tuning")
    axes.axhline(sweep.target, color="#c2571a", linestyle="--", label=f"{sweep.share:.0%} of it")
    axes.set(xscale="log", xlabel="scalars trained", ylabel=f"validation {sweep.metric}")
    axes.legend()
    plot.write(figure, path)
