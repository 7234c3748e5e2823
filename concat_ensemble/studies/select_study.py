"""Selecting members for a dataset: subsets are probed by cross-validation, the chosen one once on the test split.

run_select_study("three-backbones", DatasetOptions(name="digits")).selection.verdict
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict

from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.errors import argument
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection, with_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel
from concat_ensemble.processes import continue_alone
from concat_ensemble.studies.cost import member_costs
from concat_ensemble.studies.ensemble_folders import check_folder, replace_ensemble
from concat_ensemble.studies.ensembles import is_local_ensemble, load_ensemble
from concat_ensemble.studies.measuring import choose_metric
from concat_ensemble.studies.options import SelectOptions
from concat_ensemble.studies.outputs import check_own_folder, check_parent
from concat_ensemble.studies.probing import probe_ensemble
from concat_ensemble.studies.results import RESULTS, Results
from concat_ensemble.studies.selection import quick_part, select_members
from concat_ensemble.studies.selection_results import Selection


@dataclass
class SelectStudy:
    """A selection, its file, and, unless it is a quick one, the results of what was chosen."""

    selection: Selection
    path: Path
    results: Results | None = None


def run_select_study(
    model: str,
    dataset: DatasetOptions,
    options: SelectOptions | None = None,
    extraction: ExtractionOptions | None = None,
    *,
    on_selection: Callable[[SelectStudy], None] = lambda study: None,
    write_card: Callable[[Path], str | None] = lambda folder: None,
) -> SelectStudy:
    """Choose members for a dataset, write the selection to a file, and probe and save what was chosen.

    `on_selection` is called before what was chosen is probed, and `write_card` with the folder of what was chosen
    before it takes its place; it may return a sentence for the user. Under `accelerate launch` the processes share the
    extraction of the ensemble, and then all but the main one end. Raises ValueError for options that do not go
    together, an ensemble of one member, or a budget that no subset meets.
    """
    options, extraction = options or SelectOptions(), extraction or ExtractionOptions()
    if options.quick and (options.output or options.num_components):
        others = f"{argument('output')} and {argument('num_components')}"
        raise ValueError(f"{argument('quick', True)} only looks; leave it out, or {others}.")
    home = Path(model) if is_local_ensemble(model) else Path()
    path = home / "selection" / f"{dataset.file_stem}{'-quick' if options.quick else ''}.json"
    if is_local_ensemble(model):
        check_own_folder(path.parent)
    check_parent(path)
    if options.output:
        check_folder(options.output, options.overwrite)
    ensemble = load_ensemble(model, dataset.seed)
    if len(ensemble.config.built_members) < 2:
        raise ValueError(f"{model} has one member; there is nothing to choose among.")
    audited = dataset.load()
    data = audited.data
    whole = ensemble.export_active(ensemble.config.built_members)  # without a projection, which needs all members
    if not options.quick:  # with the test images, which are used last, while there are other processes to help
        extract_features(whole, data, **dataclasses.asdict(extraction))
    table = extract_features(whole, _selection_images(data, dataset, options), **dataclasses.asdict(extraction))
    continue_alone()
    metric = choose_metric(options.metric, dataset.record.get("metric"), audited.audit)
    study = SelectStudy(_select(ensemble, table, metric, options, dataset.seed), path)
    study.selection.audit = audited.audit.to_dict()
    study.selection.save(path)
    on_selection(study)
    if options.quick:
        return study

    best = study.selection.best
    chosen = ensemble.export_active(list(best))
    if options.num_components:
        chosen = with_projection(chosen, principal_projection(table.members(best), options.num_components))
    about = {
        "name": options.output.name if options.output else "+".join(map(str, best)),
        "described": dataset.describe(audited),
        "audit": audited.audit,
        "metric": metric,
        "baselines": {f"all {len(whole.members)} members": whole} if len(best) < len(whole.members) else {},
        "seed": dataset.seed,
    }
    study.results, _ = probe_ensemble(chosen, data, **about, **dataclasses.asdict(extraction))
    study.results.command = options.command
    if options.output:
        results = study.results

        def save(folder: Path) -> None:
            chosen.save_pretrained(folder)
            results.save(folder / RESULTS / f"{dataset.file_stem}.json")

        replace_ensemble(options.output, save, write_card, quiet=extraction.quiet)
    return study


def _selection_images(data: DatasetDict, dataset: DatasetOptions, options: SelectOptions) -> DatasetDict:
    """Training and validation images; the test split is not looked at."""
    if options.quick:
        return quick_part(data, dataset.seed)
    return DatasetDict({name: data[name] for name in ("train", "validation")})


def _select(
    ensemble: ConcatEnsembleModel, table: FeatureTable, metric: str, options: SelectOptions, seed: int
) -> Selection:
    return select_members(
        table,
        member_costs(ensemble),
        [ensemble.config.members[k]["architecture"] for k in ensemble.config.built_members],
        margin=options.margin / 100,
        metric=metric,
        max_members=options.max_members,
        max_gflops=options.max_gflops,
        max_parameters=options.max_parameters,
        seed=seed,
    )
