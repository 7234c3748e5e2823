"""Audits that need features: of a table without images, and of the images that extraction left out."""

import dataclasses
from itertools import combinations

import numpy as np

from concat_ensemble.data.audit import FEW_IMAGES, Audit, is_imbalanced
from concat_ensemble.features.table import FeatureTable, row_hashes


def audit_table(table: FeatureTable) -> tuple[FeatureTable, Audit]:
    """Audit a table as `audit_splits` does a dataset, where equal rows of features stand for equal images: validation
    and test rows that are also in an earlier split, or share a group with one, are left out.

    Raises ValueError if no row of a split is left.
    """
    splits = {split: table[split] for split in ("train", "validation", "test") if split in table}
    hashes = {split: row_hashes(rows) for split, rows in splits.items()}
    groups = {split: rows.groups.tolist() for split, rows in splits.items() if rows.groups is not None}
    parts = {}
    for split, rows in splits.items():
        parts[split] = rows.select(_rows_without_leaks(split, hashes, groups))
        if not len(parts[split]):
            problem = f"all {split} rows, or their groups, are also in an earlier split"
            raise ValueError(f"{problem}; give others for {split}.")
    used = dataclasses.replace(
        table,
        blocks={split: part.blocks for split, part in parts.items()},
        labels={split: part.labels for split, part in parts.items()},
        groups={split: part.groups for split, part in parts.items() if part.groups is not None} or None,
    )
    audit = _count(used)
    removed = {split: len(rows) - len(parts[split]) for split, rows in splits.items()}
    audit.removed_from_test, audit.removed_from_validation = removed["test"], removed.get("validation", 0)
    audit.duplicates_within = {split: len(each) - len(set(each)) for split, each in hashes.items()}
    for first, second in combinations(splits, 2):
        earlier = set(hashes[first])
        audit.duplicates_across[f"{first}/{second}"] = sum(row in earlier for row in hashes[second])
        if groups:
            audit.groups_across[f"{first}/{second}"] = len(set(groups[first]) & set(groups[second]))
    return used, audit


def _rows_without_leaks(split: str, hashes: dict[str, list], groups: dict[str, list]) -> np.ndarray:
    """Numbers of the rows of a split whose hash and group are in no split before it."""
    leaks = np.zeros(len(hashes[split]), bool)
    for values in [hashes, groups] if groups else [hashes]:
        earlier = set().union(*(values[other] for other in list(values)[: list(values).index(split)]))
        leaks |= np.array([value in earlier for value in values[split]], bool)
    return np.flatnonzero(~leaks)


def _count(table: FeatureTable) -> Audit:
    """What labels and groups tell."""
    names = table.class_names
    counts = {split: np.bincount(table[split].labels, minlength=len(names)) for split in table}
    fitted = np.sum([counts[split] for split in counts if split != "test"], axis=0)
    is_few = [(part > 0) & (part < FEW_IMAGES) for part in (fitted, counts["test"])]
    return Audit(
        num_images={split: len(table[split]) for split in table},
        classes={name: {split: int(counts[split][k]) for split in counts} for k, name in enumerate(names)},
        majority_class=names[int(counts["train"].argmax())],
        majority_share=float(counts["train"].max() / counts["train"].sum()),
        imbalanced=any(is_imbalanced(counts[split].tolist()) for split in ("train", "test")),
        few_images=[names[k] for k in np.flatnonzero(is_few[0] | is_few[1])],
        missing_classes={split: [names[k] for k in np.flatnonzero(counts[split] == 0)] for split in counts},
        groups={split: len(np.unique(each)) for split, each in (table.groups or {}).items()} or None,
    )


def with_skipped(audit: Audit, table: FeatureTable) -> Audit:
    """The audit with the images that extraction could not read and left out."""
    if not table.skipped:
        return audit
    unreadable = {split: len(rows) for split, rows in table.skipped.items()}
    return dataclasses.replace(audit, unreadable=unreadable, num_images={split: len(table[split]) for split in table})
