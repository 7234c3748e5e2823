"""Probing an ensemble, or a table of features, on a dataset beside its parts, other ensembles and the controls."""

import time
from collections.abc import Sequence

import torch
from datasets import DatasetDict
from torch import nn

from concat_ensemble.console import show_progress
from concat_ensemble.data.audit import Audit, audit_splits
from concat_ensemble.data.bad_images import without_rows
from concat_ensemble.data.labels import read_groups, read_labels
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.standardized import default_device
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsemblePreTrainedModel,
)
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.auditing import audit_table, with_skipped
from concat_ensemble.studies.candidates import (
    NO_COST,
    Candidate,
    ensemble_candidates,
    majority_candidate,
    pixel_candidate,
    table_candidates,
    untrained_candidate,
)
from concat_ensemble.studies.controls import untrained_like
from concat_ensemble.studies.cost import describe_hardware, member_costs
from concat_ensemble.studies.measuring import (
    NEVER,
    ProbeSettings,
    check_test_split,
    choose_metric,
    collect_convergence_warnings,
    fit_probe,
    measure_majority,
    measure_probe,
    warn_of_convergence,
)
from concat_ensemble.studies.options import CONTROLS
from concat_ensemble.studies.provenance import members_sha256, training_cost, versions
from concat_ensemble.studies.results import MAJORITY, MAX_CONFUSION, UNTRAINED, Results, Row


def probe_ensemble(
    model: ConcatEnsemblePreTrainedModel,
    dataset: DatasetDict,
    *,
    name: str = "ensemble",
    described: dict | None = None,
    audit: Audit | None = None,
    baselines: dict[str, ConcatEnsemblePreTrainedModel] | None = None,
    controls: str = "all",
    metric: str | None = None,
    class_weight: str | None = None,
    num_resamples: int = 5,
    seed: int = 0,
    untrained_seed: int | None = None,
    quiet: bool = False,
    **extraction,
) -> tuple[Results, LinearProbe]:
    """Fit linear probes of an ensemble and of everything that its accuracy should be compared with.

    These are its first members, each member alone, the ensemble projected to the features of one member, the
    baselines and the controls.

    Args:
        model: The ensemble. Its members run once; its parts are columns of the same table.
        dataset: The splits `train`, `validation` and `test`.
        name: Name of the ensemble in the table.
        described: Settings of the dataset, for the record. Its `metric`, if there is one, is the customary one.
        audit: What `audit_splits` found in the dataset. Default: the dataset is audited here, and test images that are
            also in training are left out.
        baselines: Other ensembles by name, such as one network that was trained longer or is wider.
        controls: "all": untrained members, raw pixels and the majority class. "quick": without untrained members,
            which take as long as the ensemble itself. "none": no controls.
        metric: One of `METRICS`: it chooses every L2 strength, and rows are compared in it. Default: the customary
            one, else mean per-class recall where the audit finds imbalanced classes, else top-1.
        class_weight: "balanced" for a loss in which each class counts as much as the others.
        num_resamples: Number of bootstrap resamples of the training images.
        seed: Seed of the random projection and the resamples; recorded with every run.
        untrained_seed: Seed of the untrained members. Default: `seed`.
        extraction: Further arguments of `extract_features`.

    Returns:
        The results, and the probe of the whole ensemble.

    Raises:
        ValueError: for an unknown metric, class weight or kind of controls, and test images of one class or group
            where the metric or its interval needs two.
    """
    if controls not in CONTROLS:
        raise ValueError(f"controls={controls!r} must be one of {', '.join(CONTROLS)}.")
    started, described = time.perf_counter(), described or {}
    if audit is None:
        dataset, audit = audit_splits(dataset)
    metric = choose_metric(metric, described.get("metric"), audit)
    settings = ProbeSettings(metric=metric, class_weight=class_weight, num_resamples=num_resamples, seed=seed)
    groups = read_groups({"test": dataset["test"]})
    check_test_split(metric, read_labels(dataset["test"]), None if groups is None else groups["test"])
    extraction = {"quiet": quiet, **extraction}
    table = extract_features(model, dataset, **extraction)
    dataset, extraction["skip_bad"] = without_rows(dataset, table.skipped), False  # all rows are of the same images
    seconds = {"extraction": time.perf_counter() - started}
    device = extraction.get("device") or default_device()
    costs = member_costs(model, device)
    candidates = ensemble_candidates(model, table, name, costs=costs, seed=seed)
    baselines = dict(baselines or {})
    if model.config.projection_dim is not None:
        baselines = {f"{name}, not projected": model.export_active(model.config.built_members), **baselines}
    candidates += _baseline_candidates(baselines, dataset, device, extraction)
    if controls == "all":
        untrained = untrained_like(model, seed if untrained_seed is None else untrained_seed)
        features = extract_features(untrained, dataset, title=f"features: {UNTRAINED}", **extraction)
        candidates.append(untrained_candidate(features, len(costs), sum(costs, NO_COST)))
    if controls != "none":
        candidates += [pixel_candidate(model, dataset, quiet=quiet), majority_candidate(table)]
    rows, probe = _measure_all(candidates, settings, quiet=quiet)
    results = Results(
        ensemble=name,
        dataset=described,
        probe=settings.record,
        rows=rows,
        members_sha256=members_sha256(model.config),
        versions=versions(),
        seconds=seconds | {"total": time.perf_counter() - started},
        hardware=describe_hardware(device),
        controls=controls,
        audit=with_skipped(audit, table).to_dict(),
        class_names=_short_class_names(table),
    )
    return results, probe


def probe_table(
    table: FeatureTable,
    *,
    name: str = "features",
    metric: str | None = None,
    class_weight: str | None = None,
    num_resamples: int = 5,
    seed: int = 0,
    quiet: bool = False,
) -> Results:
    """Fit linear probes of a table of features, wherever they come from, as `probe_ensemble` does for an ensemble.

    The rows are the whole table, its first members, each member alone, the table projected to the features of one
    member, and the majority class. Test rows that are also in training are left out, as `audit_table` does.

    Args:
        table: Features of the splits `train` and `test`, and of `validation` if it is there.
        name: Name of the features in the results.
        metric, class_weight, num_resamples, seed: As for `probe_ensemble`.
        quiet: Show no progress.

    Raises:
        ValueError: As `probe_ensemble`, and for a table without training or test rows.
    """
    for split in ("train", "test"):
        if split not in table:
            raise ValueError(f"the table has the splits {', '.join(table)} but must have {split}; add it.")
    started = time.perf_counter()
    table, audit = audit_table(table)
    metric = choose_metric(metric, None, audit)
    settings = ProbeSettings(metric=metric, class_weight=class_weight, num_resamples=num_resamples, seed=seed)
    check_test_split(metric, table["test"].labels, table["test"].groups)
    candidates = [*table_candidates(table, name, seed=seed), majority_candidate(table)]
    rows, _ = _measure_all(candidates, settings, quiet=quiet)
    return Results(
        ensemble=name,
        dataset={"name": name, "test_images": len(table["test"])},
        probe=settings.record,
        rows=rows,
        versions=versions(),
        seconds={"total": time.perf_counter() - started},
        controls="quick",
        audit=audit.to_dict(),
        class_names=_short_class_names(table),
    )


def with_head(
    model: ConcatEnsemblePreTrainedModel, probe: LinearProbe, names: list[str]
) -> ConcatEnsembleForImageClassification:
    """The ensemble with a head from the coefficients of a probe of all its features; it shares the members' weights.

    A class of `names` without training images gets a logit too low to be predicted.
    """
    config = ConcatEnsembleConfig(
        members=model.config.members,
        standardize=True,
        projection_dim=model.config.projection_dim,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )
    with torch.device("meta"):
        classifier = ConcatEnsembleForImageClassification(config)
    classifier.members, classifier.projection = model.members, model.projection
    classifier.classifier = nn.Linear(config.num_features, len(names))
    weight, bias = torch.zeros(len(names), config.num_features), torch.full((len(names),), NEVER)
    weight[probe.classes_] = torch.tensor(probe.coef_).float()
    bias[probe.classes_] = torch.tensor(probe.intercept_).float()
    head = {
        "classifier.weight": weight,
        "classifier.bias": bias,
        "feature_mean": torch.tensor(probe.mean_).float(),
        "feature_scale": torch.tensor(probe.scale_).float(),
    }
    classifier.load_state_dict(head, strict=False, assign=True)
    return classifier.eval()


def _short_class_names(table: FeatureTable) -> list[str]:
    """The names of the classes, for the confusion matrix; empty where there are too many for one."""
    return table.class_names if len(table.class_names) <= MAX_CONFUSION else []


def _baseline_candidates(
    baselines: dict[str, ConcatEnsemblePreTrainedModel], dataset: DatasetDict, device: str, extraction: dict
) -> list[Candidate]:
    candidates = []
    for name, baseline in baselines.items():
        features = extract_features(baseline, dataset, title=f"features: {name}", **extraction)
        row = Row(name, "baseline", sum(features.feature_dims), len(baseline.members), *training_cost(baseline))
        row.cost = sum(member_costs(baseline, device), NO_COST)
        candidates.append(Candidate(row, features))
    return candidates


def _measure_all(
    candidates: Sequence[Candidate], settings: ProbeSettings, *, quiet: bool
) -> tuple[list[Row], LinearProbe]:
    """Add a run to the row of every candidate; return the rows and the probe of the first."""
    probes, failures = [], []
    with show_progress("probes", len(candidates), unit="probes", quiet=quiet) as advance:
        for row, table in candidates:
            with collect_convergence_warnings() as messages:
                if row.name == MAJORITY:
                    row.runs.append(measure_majority(table, settings))
                else:
                    probes.append(_fit(row, table, settings))
                    row.runs.append(measure_probe(probes[-1], table, settings, confusion=row.kind == "ensemble"))
            row.runs[0].converged = not messages
            failures += messages
            advance()
    warn_of_convergence(failures)
    return [row for row, _ in candidates], probes[0]


def _fit(row: Row, table: FeatureTable, settings: ProbeSettings) -> LinearProbe:
    return fit_probe(table, settings, standardize=row.kind != "projected")
