"""What the audit of a study's data found, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concat_ensemble.studies.results import Results

if TYPE_CHECKING:
    from concat_ensemble.data.audit import Audit


def read_audit(study: Results) -> Audit | None:
    """The audit that results record; None for those that were measured without one."""
    from concat_ensemble.data.audit import Audit  # loads `datasets`

    return None if study.audit is None else Audit.from_dict(study.audit)


def audit_sentences(study: Results) -> list[str]:
    """What is wrong with the data, worst first; empty where nothing is, or where the data were not audited."""
    audit = read_audit(study)
    return [] if audit is None else [sentence[:1].upper() + sentence[1:] for sentence in audit.sentences()]


def describe_data(study: Results) -> list[str]:
    """How many images, classes and groups there are, and what is wrong with them; empty without an audit."""
    audit = read_audit(study)
    if audit is None:
        return []
    images = ", ".join(f"{number:,} {split}" for split, number in audit.num_images.items())
    sentences = [f"Images: {images}." if study.repeats == 1 else f"Images, of the first repeat: {images}."]
    if audit.majority_class is not None:
        share = f"{audit.majority_share:.1%} of the training images"
        sentences.append(f"{len(audit.classes):,} classes; the largest, {audit.majority_class!r}, has {share}.")
    if audit.groups is not None:
        groups = ", ".join(f"{number:,} {split}" for split, number in audit.groups.items())
        is_separate = audit.removed_from_test or not any(audit.groups_across.values())
        sentences.append(f"Groups{', none of which is in two splits' if is_separate else ''}: {groups}.")
    problems = audit_sentences(study)
    if not problems:
        problems = ["No image is in two splits or twice in one, and no class is missing or small."]
    return sentences + problems
