"""The rows of a probe's results before they are measured: an ensemble, its parts, its baselines and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datasets import DatasetDict

from concat_ensemble.features.projection import principal_projection, random_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel
from concat_ensemble.studies.controls import pixel_table
from concat_ensemble.studies.provenance import training_cost
from concat_ensemble.studies.results import MAJORITY, PIXELS, UNTRAINED, Cost, Row

NO_COST = Cost(0.0, 0.0)


class Candidate(NamedTuple):
    """A row of the results, still without runs, and the features to probe for it."""

    row: Row
    table: FeatureTable


def table_candidates(table: FeatureTable, name: str, *, seed: int, num_members: int | None = None) -> list[Candidate]:
    """A table as a whole, its first members, each member, and the whole projected to the features of one member.

    `num_members` is the number of members where the table has one block for all of them, those of a projection.
    """
    dims, count = table.feature_dims, len(table.feature_dims)
    whole = Row(name, "ensemble", sum(dims), num_members or count)
    candidates = [Candidate(whole, table)]
    if count == 1:
        return candidates
    for k in range(count - 1, 1, -1):
        first = Row(f"{name}, first {k} members", "first_members", sum(dims[:k]), k)
        candidates.append(Candidate(first, table.members(range(k))))
    for k in range(count):
        alone = Row(f"{name}, member {k} alone", "member", dims[k], 1)
        candidates.append(Candidate(alone, table.members([k])))
    largest = max(dims)
    projections = principal_projection(table, largest), random_projection(table, largest, seed)
    for method, projection in zip(("PCA", "random projection"), projections, strict=True):
        projected = Row(f"{name}, {method} to {largest}", "projected", largest, count)
        candidates.append(Candidate(projected, projection(table)))
    return candidates


def ensemble_candidates(
    model: ConcatEnsemblePreTrainedModel, table: FeatureTable, name: str, *, costs: Sequence[Cost], seed: int
) -> list[Candidate]:
    """`table_candidates` of an ensemble's features, with what its members cost, by `costs`, and took to train."""
    candidates = table_candidates(table, name, seed=seed, num_members=len(costs))
    member = 0
    for row, _ in candidates:
        numbers = range(row.num_members)  # the first members, or all
        if row.kind == "member":
            numbers, member = [member], member + 1
        row.steps, row.gflops = training_cost(model, numbers)
        row.cost = sum((costs[k] for k in numbers), NO_COST)
    return candidates


def untrained_candidate(table: FeatureTable, num_members: int, cost: Cost) -> Candidate:
    """The control of as many features, none of them learned, at the `cost` of the ensemble."""
    row = Row(UNTRAINED, "control", sum(table.feature_dims), num_members, steps=0, gflops=0.0, cost=cost)
    return Candidate(row, table)


def pixel_candidate(model: ConcatEnsemblePreTrainedModel, dataset: DatasetDict, *, quiet: bool) -> Candidate:
    """The control without a network: raw pixels in the members' color mode, or all channels that they name."""
    seen = [model.config.members[k]["preprocessing"] for k in model.config.built_members]
    modes, channels = {each["image_mode"] for each in seen}, {n for each in seen for n in each.get("channels", ())}
    table = pixel_table(dataset, sorted(channels) or ("L" if modes == {"L"} else "RGB"), quiet=quiet)
    return Candidate(Row(PIXELS, "control", table.feature_dims[0], steps=0, gflops=0.0), table)


def majority_candidate(table: FeatureTable) -> Candidate:
    """The control without features: always the largest class. Of the `table`, only the labels are used."""
    return Candidate(Row(MAJORITY, "control", 0, steps=0, gflops=0.0), table)
