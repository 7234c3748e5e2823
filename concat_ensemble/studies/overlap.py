"""What one member's features hold that another's lack: the feature loss of arXiv:2506.18221, section 2, measured.

All rows are standardised by the training rows. With M = X'X / n of a split's rows, ridge from the columns A to the columns B is
W = (M_AA + l2_strength I)^-1 M_AB of the training rows, and its mean squared errors on any split follow from that split's M:

    e = diag(M_BB - 2 W'M_AB + W'M_AA W),    R2 = 1 - e / diag(M_BB)

for all members, l2_strengths and controls: after one pass over the rows, M's (2 D)^2 doubles are all that is kept.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from rich.progress import track

from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import standardized_projection
from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.files import write_json
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.ridge import Gram
from concat_ensemble.studies.controls import untrained_like

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
REPEATS = 0.9  # mean R2 from which on one is said to repeat another
DEAD = 0.01  # of the root mean square of a subject's deviations: what deviates less is dead
REST_L2_STRENGTH = (
    1e-4  # so weak that what a copy or a linear map leaves does no better than guessing (test_overlap.py)
)


@dataclass
class Subject:
    """A member, or an ensemble as a whole, by itself."""

    name: str
    num_features: int
    dead: float  # share of its features
    effective_rank: float  # exp of the entropy of the covariance's eigenvalues (Roy and Vetterli 2007)
    top1: float  # of a linear probe, on the test split


@dataclass
class Relation:
    """What the subjects `given`, side by side, hold of the subject `wanted`."""

    given: tuple[int, ...]
    source: str  # these in words
    wanted: int
    cka: float
    r2: float  # mean over living features, 0 for those predicted worse than by their mean
    untrained_r2: float  # the same from untrained networks in the place of `given`
    features: list[float | None]  # R2 of each; None for the dead
    rest_top1: float  # of a linear probe of what is not predicted, on the test split
    rest_interval: tuple[float, float]  # 95%, Wilson's


@dataclass
class Overlap:
    """For each subject its relations to the others, from who holds most of it on, then to all of them together."""

    subjects: list[Subject]
    relations: list[Relation]
    guessing: float  # share of the commonest class in the test split
    n_train: int
    n_validation: int
    n_test: int

    @property
    def verdict(self) -> list[str]:
        """A sentence for each subject: whom it repeats, or what it has that the others lack."""
        sentences = []
        for k, subject in enumerate(self.subjects):
            about = [r for r in self.relations if r.wanted == k]
            found = next((r for r in about if r.r2 >= REPEATS), about[-1])
            low, high = (100 * bound for bound in found.rest_interval)
            does = "has what is not in" if low > 100 * self.guessing else "has nothing seen to help here beyond"
            if found.r2 >= REPEATS:
                does = "repeats, as untrained networks do," if found.untrained_r2 >= REPEATS else "repeats"
            sentences.append(
                f"{subject.name} {does} {found.source}: R2 {found.r2:.2f} ({found.untrained_r2:.2f} from untrained networks; "
                f"a repeat from {REPEATS} on). Its rest alone gives top-1 {100 * found.rest_top1:.1f} [{low:.1f}, {high:.1f}], "
                f"all of it {100 * subject.top1:.1f}, guessing {100 * self.guessing:.1f}."
            )
        if min(self.n_train, self.n_test) < sum(subject.num_features for subject in self.subjects):
            sentences.append("Images are fewer than features: R2 and the rests come out too small, or as nothing.")
        return sentences

    def save(self, path: Path, **about) -> None:
        """As JSON, after what else there is to say `about` it."""
        content = about | dataclasses.asdict(self) | {"repeats_from": REPEATS, "dead_below": DEAD}
        write_json(path, content | {"verdict": self.verdict})


def compare_models(
    models: dict[str, torch.nn.Module], dataset: DatasetDict, *, seed: int = 0, quiet: bool = False, **extraction
) -> Overlap:
    """`measure_overlap` of one ensemble's members, or of several ensembles as wholes, by name and without projections, on
    a dataset from `load_data`. `seed` is of the untrained networks; `extraction` goes to `extract_features`."""
    whole = assemble([model.export_active(model.config.built_members) for model in models.values()])
    numbers, members = iter(range(len(whole.members))), whole.config.members
    subjects = {name: list(islice(numbers, len(model.members))) for name, model in models.items()}
    if len(models) == 1:
        subjects = {f"member {k} ({member['architecture']})": [k] for k, member in enumerate(members)}
    if len(subjects) < 2:  # better known before the work than after it
        raise ValueError(f"{next(iter(subjects))} is the only member; name another model beside it.")
    control = untrained_like(whole, seed + len(members))  # `seed` and those after it are of `random:` members
    both = (extract_features(each, dataset, quiet=quiet, **extraction) for each in (whole, control))
    return measure_overlap(*both, subjects, quiet=quiet)


def measure_overlap(
    table: FeatureTable, untrained: FeatureTable, subjects: dict[str, Sequence[int]], *, quiet: bool = False
) -> Overlap:
    """CKA, held-out R2 both ways, effective rank, dead features, and what the part that is not predicted is good for.

    CKA (Kornblith et al. 2019; without bias, since of any features as many as the rows it nears 1: Nguyen et al. 2021) and
    effective rank are of the training rows as they are, centred. R2 is of the test rows about the training rows' mean, each
    feature with the l2_strength, or without prediction, that does best on the validation rows. The rest that is probed is what
    a ridge of next to no l2_strength leaves: a stronger one would leave in it what `given` knows, as standardising it again
    would. The test rows have a ridge of their own (which no label enters): a probe would read what `given` knows from the
    chance errors of a shared one. Where rows are few for the features, the rest comes out too small.

    Args:
        table: With the splits `train`, `validation` and `test`.
        untrained: The control, of `controls.untrained_like`: blocks of the same widths.
        subjects: The table's members of each, by its name.

    Raises:
        ValueError: for one subject, fewer than 4 training images, or a control of other widths.
    """
    groups, everyone, width = list(subjects.values()), range(len(subjects)), sum(table.feature_dims)
    if len(groups) < 2 or len(table["train"]) < 4:
        raise ValueError(f"{len(groups)} to compare on {len(table['train'])} training images: take 2 and 4 at least.")
    if table.feature_dims != untrained.feature_dims:
        raise ValueError(
            f"untrained members of widths {untrained.feature_dims} are no control for {table.feature_dims}."
        )
    both = [
        TableSplit(table.blocks[s] + untrained.blocks[s], table.labels[s]) for s in ("train", "validation", "test")
    ]
    mean, scale = moments(both[0])
    rows, sizes = StandardizedFeatures(both[0], mean, scale), [len(split) for split in both]
    fitted, held, test = rows.gram(), *(StandardizedFeatures(split, mean, scale).gram() for split in both[1:])
    pooled = (sizes[0] * fitted + sizes[1] * held)[:width, :width] / (sizes[0] + sizes[1])
    blocks = torch.arange(width, device=rows.device).split(table.feature_dims)
    parts = [torch.cat([blocks[k] for k in group]) for group in groups]
    scales = torch.from_numpy(scale[:width]).to(fitted)
    covariance = fitted[:width, :width] * scales[:, None] * scales
    norms = [[(chunk[:, p] * scales[p]).square().sum(1) for p in parts] for _, chunk in rows.chunks()]
    norms = torch.cat([torch.stack(each) for each in norms], 1)  # (subjects, n)
    living = [v > DEAD**2 * v.mean() for v in (covariance.diagonal()[part] for part in parts)]

    single = []
    for (name, group), part, alive in zip(subjects.items(), parts, living, strict=True):
        values = torch.linalg.eigvalsh(covariance[part][:, part]).clamp_min(0)
        rank = torch.special.entr(values / values.sum().clamp_min(1e-300)).sum().exp()
        own, dead = table.members(group), 1 - float(alive.double().mean())
        probe = LinearProbe().fit(own["train"], validation=own["validation"])
        single.append(Subject(name, len(part), dead, float(rank), probe.score(own["test"])))

    jobs = [((k,), [other for other in everyone if other != k]) for k in everyone]
    jobs += [(tuple(other for other in everyone if other != k), [k]) for k in everyone if len(groups) > 2]
    relations = []
    for given, wanted in track(jobs, "overlap", disable=quiet or not sys.stderr.isatty()):
        a, b = (torch.cat([parts[k] for k in numbers]) for numbers in (given, wanted))
        r2, untrained_r2 = (_held_out_r2(fitted, held, test, each, b) for each in (a, a + width))
        source = f"the {len(given)} others" if given[1:] else single[given[0]].name
        rests = (
            next(Gram(m[a][:, a], m[a][:, b], m.new_zeros(0)).solutions([REST_L2_STRENGTH])) for m in (pooled, test)
        )
        cuts = [each.split([len(parts[k]) for k in wanted], -1) for each in (r2, untrained_r2, *rests)]
        for k, found, control, *weights in zip(wanted, *cuts, strict=True):
            seen, alive = torch.cat([a, parts[k]]).cpu().numpy(), living[k]
            part = table.members([member for number in (*given, k) for member in groups[number]])
            directions = [torch.cat([-w, torch.eye(len(parts[k])).to(w)]).cpu().numpy() for w in weights]
            rest, of_test = (standardized_projection(mean[seen], scale[seen], each)(part) for each in directions)
            rest.blocks["test"] = of_test.blocks["test"]
            probe = LinearProbe(standardize=False)
            top1 = probe.fit(rest["train"], validation=rest["validation"]).score(rest["test"])
            relations.append(Relation(
                given, source, k, _linear_cka(covariance, (a, norms[list(given)].sum(0)), (parts[k], norms[k])),
                *(float(r[alive].clamp_min(0).mean()) if alive.any() else 1.0 for r in (found, control)),
                [value if lives else None for value, lives in zip(found.tolist(), alive.tolist(), strict=True)],
                top1, wilson_interval(top1, sizes[2]),
            ))  # fmt: skip
    relations.sort(key=lambda relation: (relation.wanted, len(relation.given), -relation.r2))
    return Overlap(single, relations, float(np.bincount(both[2].labels).max() / sizes[2]), *sizes)


def _held_out_r2(fitted, held, test, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(len(b),) of the test rows, each column with what predicts the held rows best."""
    least, chosen = held.diagonal()[b], test.diagonal()[b]  # without any prediction
    for weight in Gram(fitted[a][:, a], fitted[a][:, b], fitted.new_zeros(0)).solutions(L2_STRENGTHS):
        errors = _errors(held, a, b, weight)
        chosen = torch.where(errors < least, _errors(test, a, b, weight), chosen)
        least = torch.minimum(errors, least)
    return 1 - chosen / test.diagonal()[b].clamp_min(1e-12)


def _errors(products, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(len(b),) mean squares of B - A @ weight, over the rows that `products` is of."""
    explained = weight * (2 * products[a][:, b] - products[a][:, a] @ weight)
    return (products.diagonal()[b] - explained.sum(0)).clamp_min(0)


def _linear_cka(covariance: torch.Tensor, *sides: tuple[torch.Tensor, torch.Tensor]) -> float:
    """||X_a' X_b||^2 over the like of each alone, without bias (Song et al. 2012); a side: columns, squared row norms."""
    n, inner = len(sides[0][1]), []
    for (a, first), (b, second) in ((sides[0], sides[1]), (sides[0], sides[0]), (sides[1], sides[1])):
        whole = (n * covariance[a][:, b]).square().sum() - n / (n - 2) * (first @ second)
        inner.append(float(whole + first.sum() * second.sum() / (n - 1) / (n - 2)))
    return inner[0] / (inner[1] * inner[2]) ** 0.5 if min(inner[1:]) > 0 else 0.0
