"""The options of studies; a light module, since the command line shows them."""
# ruff: noqa: RUF009 (`option` returns a field)

from dataclasses import dataclass
from pathlib import Path

from concat_ensemble.data.naming import METRICS
from concat_ensemble.data.options import option
from concat_ensemble.errors import argument

CONTROLS = ("none", "quick", "all")  # no control; those that need no network; also untrained members


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How an ensemble is probed, and what is written. Raises ValueError for a metric, class weight or kind of controls
    that there is not."""

    baselines: list[str] | None = option(
        None, "Another ensemble to compare with; may be repeated.", flags=["--baseline"]
    )
    save_head: bool = option(False, "Save the probe as the classification head of the folder.", flags=["--save-head"])
    output: Path | None = option(
        None, "Results file; in the ensemble's own folder when left out.", flags=["--output", "-o"]
    )
    repeats: int = option(1, "Draw the images this often, by --seed and the seeds after it, for an interval.", min=1)
    metric: str | None = option(
        None,
        f"Choose the L2 strength and compare in {', '.join(METRICS[:-1])} or {METRICS[-1]}; when left out, the "
        "recipe's own metric, mean_per_class for imbalanced classes, or top1.",
    )
    class_weight: str | None = option(None, "balanced: every class counts as much in the loss, however small it is.")
    controls: str = option(
        "all",
        "all; quick: raw pixels and the majority class only, without untrained members, which double the extraction; "
        "or none.",
    )
    errors: int | None = option(
        None, "Write a page with the images of this many of the most confident mistakes.", min=1
    )
    overwrite: bool = option(False, "Probe again where the results file exists.", flags=["--overwrite"])
    command: str = ""  # the command line, recorded in the results

    def __post_init__(self):
        _check_choice("metric", self.metric, METRICS)
        _check_choice("class_weight", self.class_weight, ("balanced",))
        _check_choice("controls", self.controls, CONTROLS)


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """How members are selected, and what is written. Raises ValueError for a margin that is not a number of points, or
    a metric that there is not."""

    quick: bool = option(
        False, "Use 1,500 training images, to see whether extracting the rest is worth it.", flags=["--quick"]
    )
    margin: float = option(1.0, "Points that the chosen members may lose against all of them, with 95% confidence.")
    metric: str | None = option(
        None,
        f"Compare subsets in {', '.join(METRICS[:-1])} or {METRICS[-1]}; when left out, the recipe's own metric, "
        "mean_per_class for imbalanced classes, or top1.",
    )
    max_members: int | None = option(None, "Choose at most this many members.", min=1)
    max_gflops: float | None = option(None, "Budget for what is chosen, per image.")
    max_parameters: float | None = option(None, "Budget for what is chosen, in millions.")
    num_components: int | None = option(
        None, "Project what is chosen to this many principal components.", flags=["--columns"], min=1
    )
    output: Path | None = option(
        None, "Folder for the chosen members as a new ensemble, with its results.", flags=["--output", "-o"]
    )
    overwrite: bool = option(False, "Replace an ensemble in this folder.", flags=["--overwrite"])
    command: str = ""

    def __post_init__(self):
        if not 0 < self.margin < 100:  # also for NaN
            raise ValueError(f"{argument('margin', self.margin)} must be between 0 and 100 points, such as 1.")
        _check_choice("metric", self.metric, METRICS)


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{argument(name, value)} must be one of {', '.join(choices)}.")
