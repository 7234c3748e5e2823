"""Audits that need features: of a table without images, and of the images that extraction left out."""

import dataclasses

from concat_ensemble.data.audit import Audit, audit_rows
from concat_ensemble.data.groups import number_values
from concat_ensemble.features.table import FeatureTable, row_hashes


def audit_table(table: FeatureTable) -> tuple[FeatureTable, Audit]:
    """Audit a table as `audit_splits` does a dataset, where equal rows of features stand for equal images: validation
    and test rows that are also in an earlier split, or share a group with one, are left out.

    Raises ValueError if no row of a split is left.
    """
    splits = {split: table[split] for split in ("train", "validation", "test") if split in table}
    groups = {split: rows.groups.tolist() for split, rows in splits.items() if rows.groups is not None}
    used, audit = audit_rows(
        number_values({split: row_hashes(rows) for split, rows in splits.items()}),
        {split: rows.labels for split, rows in splits.items()},
        number_values(groups) if groups else None,
        table.class_names,
    )
    parts = {split: rows.select(used[split]) for split, rows in splits.items()}
    for split, part in parts.items():
        if not len(part):
            problem = f"all {split} rows, or their groups, are also in an earlier split"
            raise ValueError(f"{problem}; give others for {split}.")
    clean = dataclasses.replace(
        table,
        blocks={split: part.blocks for split, part in parts.items()},
        labels={split: part.labels for split, part in parts.items()},
        groups={split: part.groups for split, part in parts.items() if part.groups is not None} or None,
    )
    return clean, audit


def with_skipped(audit: Audit, table: FeatureTable) -> Audit:
    """The audit with the images that extraction could not read and left out."""
    if not table.skipped:
        return audit
    unreadable = {split: len(rows) for split, rows in table.skipped.items()}
    return dataclasses.replace(audit, unreadable=unreadable, num_images={split: len(table[split]) for split in table})
