"""The options of studies; a light module, since the command line shows them."""
# ruff: noqa: RUF009 (`option` returns a field)

from dataclasses import dataclass
from pathlib import Path

from concat_ensemble.data.options import option


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How an ensemble is probed, and what is written."""

    baselines: list[str] | None = option(
        None, "Another ensemble to compare with; may be repeated.", flags=["--baseline"]
    )
    save_head: bool = option(False, "Save the probe as the classification head of the folder.", flags=["--save-head"])
    output: Path | None = option(
        None, "Results file; in the ensemble's own folder when left out.", flags=["--output", "-o"]
    )
    repeats: int = option(1, "Draw the images this often, by --seed and the seeds after it, for an interval.", min=1)
    overwrite: bool = option(False, "Probe again where the results file exists.", flags=["--overwrite"])
    command: str = ""  # the command line, recorded in the results


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """How members are selected, and what is written."""

    quick: bool = option(
        False, "Use 1,500 training images, to see whether extracting the rest is worth it.", flags=["--quick"]
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
