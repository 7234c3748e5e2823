"""Selecting members for a dataset: every subset is probed on validation images, the chosen one once on the test split.

run_select_study("three-backbones", DatasetOptions(name="digits")).selection.verdict
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict

from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection, with_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.files import replace_folder
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel
from concat_ensemble.studies.cost import member_costs
from concat_ensemble.studies.ensembles import is_local_ensemble, load_ensemble
from concat_ensemble.studies.outputs import check_folder, check_parent
from concat_ensemble.studies.probing import probe_ensemble
from concat_ensemble.studies.results import RESULTS, Results
from concat_ensemble.studies.selection import QUICK_FOLDS, Selection, quick_part, select_members


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """How members are selected, and what is written.

    Args:
        quick: Select with a few training images and stop there, to see whether extracting the rest is worth it.
        max_members, max_gflops, max_parameters: A budget for what is chosen; parameters in millions.
        num_components: Project what is chosen to this many principal components.
        output: Folder for the chosen members as a new ensemble, with the results of its probe.
        overwrite: Replace an ensemble in this folder.
        command: The command line, recorded in the results.
    """

    quick: bool = False
    max_members: int | None = None
    max_gflops: float | None = None
    max_parameters: float | None = None
    num_components: int | None = None
    output: Path | None = None
    overwrite: bool = False
    command: str = ""


@dataclass
class SelectStudy:
    """A selection, its file, and, unless it is a quick one, the results of what was chosen."""

    selection: Selection
    path: Path
    results: Results | None = None


def run_select_study(
    model: str,
    dataset: DatasetOptions,
    settings: SelectSettings | None = None,
    extraction: ExtractionOptions | None = None,
    *,
    on_selection: Callable[[SelectStudy], None] = lambda study: None,
) -> SelectStudy:
    """Choose members for a dataset, write the selection to a file, and probe and save what was chosen, without a card.

    Args:
        model: Folder or Hub id of an ensemble of at least two members.
        on_selection: Called with the selection before what was chosen is probed.

    Raises:
        ValueError: for settings that do not go together, an ensemble of one member, or a budget that no subset meets.
    """
    settings, extraction = settings or SelectSettings(), extraction or ExtractionOptions()
    if settings.quick and (settings.output or settings.num_components):
        raise ValueError("--quick only looks; leave out --output and --columns, or leave out --quick.")
    home = Path(model) if is_local_ensemble(model) else Path()
    path = home / "selection" / f"{dataset.file_stem}{'-quick' if settings.quick else ''}.json"
    check_parent(path)
    if settings.output:
        check_folder(settings.output, settings.overwrite)
    ensemble = load_ensemble(model, dataset.seed)
    if len(ensemble.config.built_members) < 2:
        raise ValueError(f"{model} has one member; there is nothing to choose among.")
    data = dataset.load()
    whole = ensemble.export_active(ensemble.config.built_members)  # without a projection, which needs all members
    table = extract_features(whole, _selection_images(data, dataset, settings), **dataclasses.asdict(extraction))
    study = SelectStudy(_select(ensemble, table, dataset, settings), path)
    study.selection.save(path)
    on_selection(study)
    if settings.quick:
        return study

    best = study.selection.best
    chosen = ensemble.export_active(list(best))
    if settings.num_components:
        chosen = with_projection(chosen, principal_projection(table.members(best), settings.num_components))
    about = {
        "name": settings.output.name if settings.output else "+".join(map(str, best)),
        "described": dataset.describe(data),
        "baselines": {f"all {len(whole.members)} members": whole} if len(best) < len(whole.members) else {},
        "seed": dataset.seed,
    }
    study.results, _ = probe_ensemble(chosen, data, **about, **dataclasses.asdict(extraction))
    study.results.command = settings.command
    if settings.output:
        with replace_folder(settings.output) as folder:
            chosen.save_pretrained(folder)
            study.results.save(folder / RESULTS / f"{dataset.file_stem}.json")
    return study


def _selection_images(data: DatasetDict, dataset: DatasetOptions, settings: SelectSettings) -> DatasetDict:
    """Training and validation images; the test split is not looked at."""
    if settings.quick:
        return quick_part(data, dataset.seed)
    return DatasetDict({name: data[name] for name in ("train", "validation")})


def _select(
    ensemble: ConcatEnsembleModel, table: FeatureTable, dataset: DatasetOptions, settings: SelectSettings
) -> Selection:
    return select_members(
        table,
        member_costs(ensemble),
        [ensemble.config.members[k]["architecture"] for k in ensemble.config.built_members],
        max_members=settings.max_members,
        max_gflops=settings.max_gflops,
        max_parameters=settings.max_parameters,
        folds=QUICK_FOLDS if settings.quick else None,
        seed=dataset.seed,
    )
