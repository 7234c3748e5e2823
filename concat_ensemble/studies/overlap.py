"""How much of one member's features the others predict: the feature loss of arXiv:2506.18221, section 2, measured.

All rows are standardized by the training rows. With M = X'X / n of a split's rows, ridge from the features A to the
features B has the weight W of the training rows, and the mean squared errors e on any split, of that split's M:

    W = (M_AA + l2_strength I)^-1 M_AB
    e = diag(M_BB - 2 W'M_AB + W'M_AA W),    R2 = 1 - e / diag(M_BB)

for all members, l2_strengths and controls. So one pass over the rows is enough, and only the (2 D)^2 doubles of each M
stay in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets

from concat_ensemble.console import show_progress
from concat_ensemble.data.cuts import cut_split
from concat_ensemble.data.splits import SPLIT_NAMES
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import standardized_projection
from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.members.assemble import assemble
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.ridge import Gram
from concat_ensemble.studies.controls import untrained_like
from concat_ensemble.studies.overlap_results import DEAD_SHARE, Overlap, Relation, Subject
from concat_ensemble.studies.results import UNTRAINED

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
# So weak that the residual of a copy or of a linear map does no better than guessing (test_overlap.py).
RESIDUAL_L2_STRENGTH = 1e-4
# Of the images to compare on, and of those that are left to fit on.
HELD_OUT_SIZE, VALIDATION_SIZE = 0.5, 0.2
Side = tuple[torch.Tensor, torch.Tensor]  # the numbers of some features, and the squared norms (n,) of their rows


def compare_models(
    models: Mapping[str, ConcatEnsemblePreTrainedModel],
    dataset: DatasetDict,
    *,
    seed: int = 0,
    quiet: bool = False,
    **extraction,
) -> Overlap:
    """Compare one ensemble's members, or several ensembles as wholes, without their projections, on the training and
    validation images: who chooses members by this has not yet looked at the test images (see `split_for_choice`).

    `seed` is that of the cut and the untrained networks, and `extraction` are further arguments of `extract_features`.
    Raises ValueError for a single ensemble of one member, and where `split_for_choice` and `measure_overlap` do.
    """
    tables = extract_subjects(models, dataset, seed=seed, quiet=quiet, **extraction)
    return measure_overlap(*tables, quiet=quiet)


def extract_subjects(
    models: Mapping[str, ConcatEnsemblePreTrainedModel], dataset: DatasetDict, *, seed: int, **extraction
) -> tuple[FeatureTable, FeatureTable, dict[str, Sequence[int]]]:
    """The arguments of `measure_overlap` for these models."""
    whole = assemble([model.export_active(model.config.built_members) for model in models.values()])
    subjects = _name_subjects(models, whole.config.members)
    if len(subjects) < 2:  # before the features are extracted
        raise ValueError(f"{next(iter(subjects))} is the only member; name another model beside it.")
    # Members called `random:` have `seed` and the seeds after it.
    control = untrained_like(whole, seed + len(whole.config.members))
    dataset = split_for_choice(dataset, seed)
    table = extract_features(whole, dataset, **extraction)
    untrained = extract_features(control, dataset, title=f"features: {UNTRAINED}", **extraction)
    return table, untrained, subjects


def split_for_choice(dataset: DatasetDict, seed: int = 0) -> DatasetDict:
    """The images of the splits `train` and `validation` of `load_data`, cut anew: half of them are the split `test` of
    the result, since a comparison needs as many rows to measure on as to fit on. Raises ValueError where there are too
    few to cut.
    """
    pooled = concatenate_datasets([dataset[name] for name in ("train", "validation") if name in dataset])
    pooled, held_out = cut_split(pooled, "test_size", HELD_OUT_SIZE, seed=seed, copies=True)
    train, validation = cut_split(pooled, "validation_size", VALIDATION_SIZE, seed=seed, copies=True)
    return DatasetDict({"train": train, "validation": validation, "test": held_out})


def measure_overlap(
    table: FeatureTable,
    untrained: FeatureTable | None = None,
    subjects: dict[str, Sequence[int]] | None = None,
    *,
    quiet: bool = False,
) -> Overlap:
    """Measure the effective rank and dead features of subjects, and how well they predict each other's features.

    CKA (Kornblith et al. 2019) and effective rank describe the centered training rows. CKA is the unbiased estimate,
    since the biased one nears 1 for any features as many as the rows (Nguyen et al. 2021). R2 is that of the test rows
    about the training rows' mean; each feature has the l2_strength, or no prediction at all, that does best on the
    validation rows. The residual is what a ridge with next to no penalty does not predict: a stronger penalty would
    leave in it some of what the sources contain, and so would standardizing it again. The test rows have a ridge of
    their own, which no label enters: through the chance errors of a shared one a probe would read what the sources
    contain. Where rows are few for the features, the residual is too small. To choose members, give a table whose test
    rows are not those that the choice is then reported on.

    Args:
        table, untrained: Features of all splits, and those of `controls.untrained_like`, of the same feature_dims.
            A table of one's own features has no such control: None leaves it out.
        subjects: The positions of each subject's members in the table, by the subject's name. By default each member
            of the table is a subject.

    Raises:
        ValueError: for a missing split, one subject, fewer than 4 training images, or a control with other
            feature_dims.
    """
    if missing := [split for split in SPLIT_NAMES if split not in table]:
        raise ValueError(f"the table has the splits {', '.join(table)} but must have {' and '.join(missing)}; add it.")
    subjects = {name: [k] for k, name in enumerate(table.member_names)} if subjects is None else subjects
    count = len(subjects)
    if count < 2 or len(table["train"]) < 4:
        raise ValueError(f"{count} to compare on {len(table['train'])} training images: take 2 and 4 at least.")
    if untrained is not None and table.feature_dims != untrained.feature_dims:
        control = f"untrained members with feature_dims={untrained.feature_dims} are no control"
        raise ValueError(f"{control} for {table.feature_dims}; extract them from untrained_like(model).")
    measured = _Moments(table, untrained, subjects)
    described = [_describe_subject(measured, table, k) for k in range(count)]
    # One subject predicts all the others in one factorization. Of three or more, all the others predict each one too.
    plans = [((k,), _without(k, count)) for k in range(count)]
    if count > 2:
        plans += [(_without(k, count), (k,)) for k in range(count)]
    relations = []
    with show_progress("overlap", len(plans), unit="comparisons", quiet=quiet) as advance:
        for sources, targets in plans:
            relations += _measure_relations(measured, table, sources, targets)
            advance()
    relations.sort(key=lambda relation: (relation.target, len(relation.sources), -relation.r2))
    labels, (n_train, n_validation, n_test) = table.labels["test"], measured.sizes
    majority_share = float(np.bincount(labels).max() / len(labels))
    return Overlap(described, relations, majority_share, n_train, n_validation, n_test)


class _Moments:
    """What one pass over the rows of each split keeps. D: number of the table's features, and of the control's."""

    def __init__(self, table: FeatureTable, untrained: FeatureTable | None, subjects: dict[str, Sequence[int]]):
        control = {} if untrained is None else untrained.blocks
        splits = [TableSplit([*table.blocks[s], *control.get(s, ())], table.labels[s]) for s in SPLIT_NAMES]
        self.has_control = untrained is not None
        self.names, self.groups = list(subjects), list(subjects.values())
        self.sizes, self.num_features = [len(split) for split in splits], sum(table.feature_dims)
        # (2 D,) of the training rows, the table's features before the control's.
        self.mean, self.scale = moments(splits[0])
        # (2 D, 2 D) float64 X'X / n of each split's standardized rows.
        rows = StandardizedFeatures(splits[0], self.mean, self.scale)
        self.train = rows.gram()
        self.validation, self.test = (StandardizedFeatures(s, self.mean, self.scale).gram() for s in splits[1:])
        # (D, D) the same of training and validation rows together, and the training rows' covariance before scaling.
        n_train, n_validation, own = *self.sizes[:2], slice(self.num_features)
        self.pooled = (n_train * self.train + n_validation * self.validation)[own, own] / (n_train + n_validation)
        scales = torch.from_numpy(self.scale[own]).to(self.train)
        self.covariance = self.train[own, own] * scales[:, None] * scales
        # For each subject the numbers of its features, which of these are living, and its rows' squared norms (n,).
        blocks = torch.arange(self.num_features, device=rows.device).split(table.feature_dims)
        self.columns = [torch.cat([blocks[k] for k in group]) for group in self.groups]
        variances = [self.covariance.diagonal()[columns] for columns in self.columns]
        self.living = [variance > DEAD_SHARE**2 * variance.mean() for variance in variances]
        norms = [
            torch.stack([(chunk[:, columns] * scales[columns]).square().sum(1) for columns in self.columns])
            for _, chunk in rows.chunks()
        ]
        self.squared_norms = torch.cat(norms, 1)


def _describe_subject(measured: _Moments, table: FeatureTable, k: int) -> Subject:
    """Measure subject `k` by itself."""
    own, members = measured.columns[k], table.members(measured.groups[k])
    eigenvalues = torch.linalg.eigvalsh(measured.covariance[own][:, own]).clamp_min(0)
    entropy = torch.special.entr(eigenvalues / eigenvalues.sum().clamp_min(1e-300)).sum()
    probe = LinearProbe().fit(members["train"], validation=members["validation"])
    dead_share = 1 - float(measured.living[k].double().mean())
    return Subject(measured.names[k], len(own), dead_share, float(entropy.exp()), probe.score(members["test"]))


def _measure_relations(
    measured: _Moments, table: FeatureTable, sources: tuple[int, ...], targets: tuple[int, ...]
) -> list[Relation]:
    """Predict each of `targets` from `sources` together."""
    name = measured.names[sources[0]] if len(sources) == 1 else f"the {len(sources)} others"
    a, b = (torch.cat([measured.columns[k] for k in subjects]) for subjects in (sources, targets))
    r2, untrained_r2 = _held_out_r2(measured, a, b), None
    if measured.has_control:
        untrained_r2 = _held_out_r2(measured, a + measured.num_features, b)
    weight, test_weight = _residual_weight(measured.pooled, a, b), _residual_weight(measured.test, a, b)
    source_norms = measured.squared_norms[list(sources)].sum(0)
    relations, start = [], 0
    for k in targets:
        own, living = measured.columns[k], measured.living[k]
        part = slice(start, start + len(own))  # of b
        start += len(own)
        members = [member for subject in (*sources, k) for member in measured.groups[subject]]
        weights = weight[:, part], test_weight[:, part]
        top1 = _probe_residual(measured, table.members(members), torch.cat([a, own]), weights)
        pairs = zip(r2[part].tolist(), living.tolist(), strict=True)
        relation = Relation(
            sources=sources,
            source_name=name,
            target=k,
            cka=_linear_cka(measured.covariance, (a, source_norms), (own, measured.squared_norms[k])),
            r2=_mean_r2(r2[part], living),
            untrained_r2=None if untrained_r2 is None else _mean_r2(untrained_r2[part], living),
            feature_r2=[value if is_living else None for value, is_living in pairs],
            residual_top1=top1,
            residual_interval=wilson_interval(top1, measured.sizes[2]),
        )
        relations.append(relation)
    return relations


def _held_out_r2(measured: _Moments, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(len(b),) R2 on the test rows; each feature has what predicts its validation rows best."""
    train, validation, test = measured.train, measured.validation, measured.test
    least, chosen = validation.diagonal()[b], test.diagonal()[b]  # the errors without any prediction
    for weight in Gram(train[a][:, a], train[a][:, b], train.new_zeros(0)).solutions(L2_STRENGTHS):
        errors = _mean_squared_errors(validation, a, b, weight)
        chosen = torch.where(errors < least, _mean_squared_errors(test, a, b, weight), chosen)
        least = torch.minimum(errors, least)
    return 1 - chosen / test.diagonal()[b].clamp_min(1e-12)


def _mean_squared_errors(products: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor):
    """(len(b),) mean squares of B - A @ weight over the rows whose X'X / n is `products`."""
    explained = weight * (2 * products[a][:, b] - products[a][:, a] @ weight)
    return (products.diagonal()[b] - explained.sum(0)).clamp_min(0)


def _mean_r2(r2: torch.Tensor, living: torch.Tensor) -> float:
    """Mean over living features, at least 0 each; 1 where all are dead, since there is nothing to predict."""
    return float(r2[living].clamp_min(0).mean()) if living.any() else 1.0


def _residual_weight(products: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(len(a), len(b)) ridge from A to B with next to no penalty, on the rows whose X'X / n is `products`."""
    gram = Gram(products[a][:, a], products[a][:, b], products.new_zeros(0))
    (weight,) = gram.solutions([RESIDUAL_L2_STRENGTH])
    return weight


def _probe_residual(
    measured: _Moments, table: FeatureTable, columns: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Top-1 of a linear probe of B - A @ weight, where `table` has the features A and then B.

    The first of `weights` gives the residual of the training and validation rows, the second that of the test rows.
    """
    mean, scale = (vector[columns.cpu().numpy()] for vector in (measured.mean, measured.scale))
    residuals = []
    for weight in weights:
        directions = torch.cat([-weight, torch.eye(weight.shape[1]).to(weight)]).cpu().numpy()
        residuals.append(standardized_projection(mean, scale, directions)(table))
    blocks = residuals[0].blocks | {"test": residuals[1].blocks["test"]}
    residual = dataclasses.replace(residuals[0], blocks=blocks)
    probe = LinearProbe(standardize=False).fit(residual["train"], validation=residual["validation"])
    return probe.score(residual["test"])


def _linear_cka(covariance: torch.Tensor, a: Side, b: Side) -> float:
    """||X_a' X_b||^2 divided by ||X_a' X_a|| ||X_b' X_b||."""
    across, *within = (_unbiased_norm(covariance, *sides) for sides in ((a, b), (a, a), (b, b)))
    return across / (within[0] * within[1]) ** 0.5 if min(within) > 0 else 0.0


def _unbiased_norm(covariance: torch.Tensor, *sides: Side) -> float:
    """Unbiased estimate of ||X_a' X_b||^2 (Song et al. 2012, equation 5, from kernels without their diagonals)."""
    (a, a_norms), (b, b_norms) = sides
    n = len(a_norms)
    inner = (n * covariance[a][:, b]).square().sum() - n / (n - 2) * (a_norms @ b_norms)
    return float(inner + a_norms.sum() * b_norms.sum() / (n - 1) / (n - 2))


def _name_subjects(
    models: Mapping[str, ConcatEnsemblePreTrainedModel], members: list[dict]
) -> dict[str, Sequence[int]]:
    """The positions of each subject's members among `members`, which are those of all models in order."""
    if len(models) == 1:
        return {f"member {k} ({member['architecture']})": [k] for k, member in enumerate(members)}
    numbers = iter(range(len(members)))
    return {name: list(itertools.islice(numbers, len(model.members))) for name, model in models.items()}


def _without(k: int, count: int) -> tuple[int, ...]:
    return tuple(other for other in range(count) if other != k)
