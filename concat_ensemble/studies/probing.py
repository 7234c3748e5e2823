"""Probing an ensemble on a dataset, beside its parts, other ensembles and the controls."""

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import DatasetDict
from rich.progress import track
from torch import nn

from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection, random_projection
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsemblePreTrainedModel,
)
from concat_ensemble.probes.intervals import bootstrap_intervals
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.metrics import ProbeMetrics
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.cost import describe_hardware, member_costs
from concat_ensemble.studies.provenance import members_sha256, training_cost, versions
from concat_ensemble.studies.results import Cost, Results, Row, Run, pack_bits

NO_COST = Cost(0.0, 0.0)
NEVER = -1e4  # the logit of a class without training images, so that it is not predicted


class Candidate(NamedTuple):
    """A row of the results, still without runs, and the features to probe for it."""

    row: Row
    table: FeatureTable


def probe_ensemble(
    model: ConcatEnsemblePreTrainedModel,
    dataset: DatasetDict,
    *,
    name: str = "ensemble",
    described: dict | None = None,
    baselines: dict[str, ConcatEnsemblePreTrainedModel] | None = None,
    num_resamples: int = 5,
    seed: int = 0,
    quiet: bool = False,
    **extraction,
) -> tuple[Results, LinearProbe]:
    """Fit linear probes of an ensemble and of everything that its accuracy should be compared with.

    These are its first members, each member alone, the ensemble projected to the features of one member, the
    baselines, untrained members and raw pixels.

    Args:
        model: The ensemble. Its members run once; its parts are columns of the same table.
        name: Name of the ensemble in the table.
        described: Settings of the dataset, for the record.
        baselines: Other ensembles by name, such as one network that was trained longer or is wider.
        num_resamples: Number of bootstrap resamples of the training images.
        seed: Seed of the untrained members, the random projection and the resamples; recorded with every run.
        extraction: Further arguments of `extract_features`.

    Returns:
        The results, and the probe of the whole ensemble.
    """
    started = time.perf_counter()
    table = extract_features(model, dataset, quiet=quiet, **extraction)
    seconds = {"extraction": time.perf_counter() - started}
    device = extraction.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    costs = member_costs(model, device)
    candidates = _ensemble_candidates(model, table, name, costs=costs, seed=seed)
    baselines = dict(baselines or {})
    if model.config.projection_dim is not None:
        baselines = {f"{name}, not projected": model.export_active(model.config.built_members), **baselines}
    for other, baseline in baselines.items():
        features = extract_features(baseline, dataset, quiet=quiet, **extraction)
        row = Row(other, "baseline", sum(features.feature_dims), len(baseline.members), *training_cost(baseline))
        row.cost = sum(member_costs(baseline, device), NO_COST)
        candidates.append(Candidate(row, features))
    untrained = extract_features(untrained_like(model, seed), dataset, quiet=quiet, **extraction)
    candidates += _control_candidates(model.config, dataset, untrained, sum(costs, NO_COST))

    probes = {}
    for row, features in track(candidates, "probes", disable=quiet or not sys.stderr.isatty()):
        probes[row.name] = _fit(row, features, seed)
        row.runs.append(_measure(probes[row.name], features, num_resamples, seed))
    results = Results(
        ensemble=name,
        dataset=described or {},
        probe={
            "kind": "linear",
            "l2_strengths": list(probes[name].l2_strengths),
            "selection": "validation top-1, then fitted on train + validation",
            "num_resamples": num_resamples,
        },
        rows=[row for row, _ in candidates],
        members_sha256=members_sha256(model.config),
        versions=versions(),
        seconds=seconds | {"total": time.perf_counter() - started},
        hardware=describe_hardware(device),
    )
    return results, probes[name]


def probe_again(
    model: ConcatEnsemblePreTrainedModel, dataset: DatasetDict, name: str, seed: int, **extraction
) -> dict[str, float]:
    """Top-1 of the ensemble, its first members, each member and its projections, by their names in `Results`."""
    table = extract_features(model, dataset, **extraction)
    costs = [NO_COST] * len(model.members)
    candidates = _ensemble_candidates(model, table, name, costs=costs, seed=seed)
    return {row.name: _fit(row, features, seed).score(features["test"]) for row, features in candidates}


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


def _ensemble_candidates(
    model: ConcatEnsemblePreTrainedModel, table: FeatureTable, name: str, *, costs: list[Cost], seed: int
) -> list[Candidate]:
    """The ensemble, its first members, each member, and the ensemble projected to the features of one member."""
    dims, count = table.feature_dims, len(table.feature_dims)  # one block where the model has a projection
    all_members = range(len(costs))

    def row(name: str, kind: str, num_features: int, members: Sequence[int]) -> Row:
        cost = sum((costs[k] for k in members), NO_COST)
        return Row(name, kind, num_features, len(members), *training_cost(model, members), cost=cost)

    candidates = [Candidate(row(name, "ensemble", sum(dims), all_members), table)]
    if count == 1:
        return candidates
    for k in range(count - 1, 1, -1):
        first = row(f"{name}, first {k} members", "first_members", sum(dims[:k]), range(k))
        candidates.append(Candidate(first, table.members(range(k))))
    for k in range(count):
        alone = row(f"{name}, member {k} alone", "member", dims[k], [k])
        candidates.append(Candidate(alone, table.members([k])))
    largest = max(dims)
    projections = principal_projection(table, largest), random_projection(table, largest, seed)
    for method, projection in zip(("PCA", "random projection"), projections, strict=True):
        projected = row(f"{name}, {method} to {largest}", "projected", largest, all_members)
        candidates.append(Candidate(projected, projection(table)))
    return candidates


def _control_candidates(
    config: ConcatEnsembleConfig, dataset: DatasetDict, untrained: FeatureTable, cost: Cost
) -> list[Candidate]:
    """Untrained members, at the `cost` of the ensemble, and raw pixels in the color mode of the members."""
    num_features, count = sum(untrained.feature_dims), len(config.built_members)
    members = Row("untrained members", "control", num_features, count, steps=0, gflops=0.0, cost=cost)
    modes = {config.members[k]["preprocessing"]["image_mode"] for k in config.built_members}
    table = pixel_table(dataset, "L" if modes == {"L"} else "RGB")
    pixels = Row("raw pixels", "control", table.feature_dims[0], steps=0, gflops=0.0)
    return [Candidate(members, untrained), Candidate(pixels, table)]


def _fit(row: Row, table: FeatureTable, seed: int) -> LinearProbe:
    probe = LinearProbe(standardize=row.kind != "projected", seed=seed)
    return probe.fit(table["train"], validation=table["validation"])


def _measure(probe: LinearProbe, table: FeatureTable, num_resamples: int, seed: int) -> Run:
    """Score `probe`, and probes like it on bootstrap resamples of the training images, on the test split."""
    test, labeled = table["test"], TableSplit.concatenate([table["train"], table["validation"]])
    scores = np.full((len(test), len(table.class_names)), NEVER)
    scores[:, probe.classes_] = probe.logits(test)
    predicted = scores.argmax(axis=1)
    rng, resamples = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        rows = np.sort(rng.integers(0, len(labeled), len(labeled)))
        resampled = LinearProbe([probe.l2_strength_], probe.standardize, tol=1e-4)
        resamples.append(resampled.fit(labeled.select(rows)).score(test))
    return Run(
        seed=seed,
        metrics=ProbeMetrics().compute(predictions=scores, references=test.labels) or {},
        l2_strength=probe.l2_strength_,
        n_train=len(labeled),
        n_test=len(test),
        intervals={metric: list(ends) for metric, ends in bootstrap_intervals(predicted, test.labels, seed).items()},
        resamples=resamples,
        correct=pack_bits(predicted == test.labels),
    )
