"""An audit of a dataset before anything is measured on it: copies of images, shared groups, class balance."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from datasets import Dataset, DatasetDict
from msgspec import Meta

from concat_ensemble.data.groups import number_images, number_values
from concat_ensemble.data.images import image_hashes, with_hashes
from concat_ensemble.data.labels import class_names, read_groups, read_labels
from concat_ensemble.errors import argument
from concat_ensemble.schema import Count, Share, Text

FEW_IMAGES = 5  # below, the recall of a class moves by more than 20 points with one image
SHOWN_NAMES = 5
SPLITS = {"train": "training", "validation": "validation", "test": "test"}  # in sentences
PAIRS = list(combinations(SPLITS, 2))
SplitName = Annotated[str, Meta(pattern=f"^({'|'.join(SPLITS)})$")]
SplitCounts = dict[SplitName, Count]


@dataclass
class Audit:
    """What was found in a dataset, as plain JSON values. Images are counted as they are used, after `audit_splits` has
    left rows out, and so are repetitions; leaks, conflicts and shared groups as they were found, before it."""

    num_images: SplitCounts = field(default_factory=dict)  # by split, like all dicts but `classes`
    classes: dict[str, SplitCounts] = field(default_factory=dict)  # name of the class -> images by split
    majority_class: Text | None = None  # the largest class of the training split
    majority_share: Share = 0.0  # its share of the training images
    imbalanced: bool = False  # of the training or the test split: see `is_imbalanced`
    duplicates_within: SplitCounts = field(default_factory=dict)  # images that repeat an earlier one of the split
    duplicates_across: dict[str, Count] = field(default_factory=dict)  # "train/test": test images that are in training
    conflicting_labels: Count = 0  # different images with more than one label, over all splits
    few_images: list[Text] = field(default_factory=list)  # classes with 1 to 4 test, or training + validation, images
    missing_classes: dict[SplitName, list[Text]] = field(default_factory=dict)
    removed_from_test: Count = 0
    removed_from_validation: Count = 0
    groups: SplitCounts | None = None  # number of groups
    groups_across: dict[str, Count] = field(default_factory=dict)  # "train/test": number of groups in both
    unreadable: SplitCounts = field(default_factory=dict)  # images that could not be read and were left out
    sha256: Text = ""  # of the encoded images and labels that are used, in their order; empty for a table
    test_sha256: Text = ""  # the same of the test split alone; empty for a table, or where repeats have different ones

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote, also by another version of this package: unknown keys are ignored."""
        names = {each.name for each in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def sentences(self) -> list[str]:
        """What a reader of the results should know, worst first; empty if nothing was found."""
        problems = [*self._leaks("test"), *self._leaks("validation"), *self._label_problems()]
        return [*problems, *self._imbalances(), *self._class_gaps(), *self._repetitions()]

    def _leaks(self, split: str) -> list[str]:
        """What the test or the validation split shares with the splits before it."""
        removed = self.removed_from_test if split == "test" else self.removed_from_validation
        total = self.num_images.get(split, 0) + removed
        sentences = []
        for earlier in [earlier for earlier, later in PAIRS if later == split]:
            if copies := self.duplicates_across.get(f"{earlier}/{split}", 0):
                verb = "is" if copies == 1 else "are"
                sentences.append(f"{copies:,} of {total:,} {split} images {verb} also in {SPLITS[earlier]}")
            if shared := self.groups_across.get(f"{earlier}/{split}", 0):
                subject = "1 group has" if shared == 1 else f"{shared:,} groups have"
                sentences.append(f"{subject} images both in {SPLITS[earlier]} and in the {split} split")
        role = "left out of the score" if split == "test" else "not used to choose the regularization"
        if len(sentences) == 1 and "group" not in sentences[0]:
            sentences[0] += f"; {'it is' if removed == 1 else 'they are'} {role}"
        elif removed and sentences:
            subject = "1 image is" if removed == 1 else f"{removed:,} of {total:,} images are"
            sentences[-1] += f"; {subject} {role} for that"
        return [f"{sentence}." for sentence in sentences]

    def _label_problems(self) -> list[str]:
        sentences = []
        if count := self.conflicting_labels:
            subject = "1 image stands" if count == 1 else f"{count:,} images stand"
            sentences.append(f"{subject} in the data with different labels; at most one label of each is right.")
        for split, count in self.unreadable.items():
            if count:
                subject = "1 image" if count == 1 else f"{count:,} images"
                left_out = "it is" if count == 1 else "they are"
                sentences.append(f"{subject} of the {SPLITS[split]} split cannot be read; {left_out} left out.")
        return sentences

    def _imbalances(self) -> list[str]:
        sentences = []
        for split in ("train", "test"):
            counts = {name: images.get(split, 0) for name, images in self.classes.items()}
            fitted = [count + self.classes[name].get("validation", 0) for name, count in counts.items()]
            if not is_imbalanced(list(counts.values())) or (split == "train" and not is_imbalanced(fitted)):
                continue
            largest, num_classes = max(counts, key=lambda name: counts[name]), sum(map(bool, counts.values()))
            share, even = counts[largest] / sum(counts.values()), 1 / num_classes
            excess = "over twice its even share" if num_classes > 2 else "over two thirds"
            what = f"class {largest!r} has {share:.1%} of the {SPLITS[split]} images, {excess}"
            sentences.append(f"{what} (even: {even:.1%}): top-1 misleads; read mean-per-class recall.")
        return sentences[:1]  # the training split's, where both are

    def _class_gaps(self) -> list[str]:
        empty = [name for name, images in self.classes.items() if not any(images.values())]
        gaps = {f"in the {split} split": set(names) - set(empty) for split, names in self.missing_classes.items()}
        sentences = []
        for where, missing in ({"in any split": set(empty)} | gaps).items():
            if names := [name for name in self.classes if name in missing]:
                verb = "has" if len(names) == 1 else "have"
                sentences.append(f"{_listed(names, len(self.classes))} {verb} no images {where}.")
        if names := self.few_images:
            verb = "has" if len(names) == 1 else "have"
            sentences.append(
                f"{_listed(names, len(self.classes))} {verb} fewer than {FEW_IMAGES} images to train or to test on; "
                "read their recall with care."
            )
        return sentences

    def _repetitions(self) -> list[str]:
        sentences = []
        for split, count in self.duplicates_within.items():
            if count:
                subject = "1 image repeats" if count == 1 else f"{count:,} images repeat"
                effect = "it counts" if count == 1 else "they count"
                sentences.append(f"{subject} an earlier image of the {SPLITS[split]} split; {effect} several times.")
        return sentences


class AuditedData(NamedTuple):
    """A dataset from `load_data` without the test and validation rows that leak, and what the audit found."""

    data: DatasetDict
    audit: Audit


def audit_splits(data: DatasetDict) -> AuditedData:
    """Audit the splits of `load_data`, and leave rows out that would flatter the score.

    These are test images that are also in training or validation, and validation images that are also in training, be
    it the image itself (the same encoded bytes) or another image of its group. Every split of the result has the
    column `image_hash`, so that extraction does not read the images once more for their hashes.

    Raises ValueError if no test or validation image is left.
    """
    splits = {name: with_hashes(data[name]) for name in SPLITS if name in data}
    groups = read_groups(splits)
    used, audit = audit_rows(
        number_images(splits),
        {name: read_labels(split) for name, split in splits.items()},
        None if groups is None else number_values({name: list(each) for name, each in groups.items()}),
        class_names(next(iter(splits.values()))),
    )
    for name, rows in used.items():
        if not len(rows):
            raise ValueError(_nothing_left(name, len(splits[name]), audit))
    kept = {
        name: split.select(used[name]) if len(used[name]) < len(split) else split for name, split in splits.items()
    }
    audit.sha256 = _hash_splits(kept)
    audit.test_sha256 = _hash_splits({"test": kept["test"]}) if "test" in kept else ""
    return AuditedData(DatasetDict(kept.items()), audit)


def audit_rows(
    images: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray] | None,
    names: list[str],
) -> tuple[dict[str, np.ndarray], Audit]:
    """Audit rows by number: those of each split that do not leak, and what was found.

    Args:
        images, groups: (N,) int64 by split, in the order train, validation, test: equal images, or groups, have one
            number in all splits.
        labels: (N,) class numbers by split.
        names: Of the classes.
    """
    used, audit = _used_rows(images, groups), Audit()
    audit.duplicates_within = {name: len(rows) - len(np.unique(images[name][rows])) for name, rows in used.items()}
    audit.duplicates_across = {
        f"{earlier}/{later}": int(np.isin(images[later], images[earlier]).sum())
        for earlier, later in PAIRS
        if earlier in images and later in images
    }
    every = np.stack([np.concatenate([each[name] for name in images]) for each in (images, labels)])
    audit.conflicting_labels = int((np.bincount(np.unique(every, axis=1)[0]) > 1).sum())
    removed = {name: len(each) - len(used[name]) for name, each in images.items()}
    audit.removed_from_test, audit.removed_from_validation = removed.get("test", 0), removed.get("validation", 0)
    if groups is not None:
        audit.groups_across = _count_shared(groups)
        audit.groups = {name: len(np.unique(groups[name][rows])) for name, rows in used.items()}
    _count_classes(audit, {name: labels[name][rows] for name, rows in used.items()}, names)
    return used, audit


def _hash_splits(splits: Mapping[str, Dataset]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        labels = np.asarray(read_labels(split), "<i8")
        digest.update(f"{name} {len(labels)} ".encode() + b"".join(image_hashes(split)) + labels.tobytes())
    return digest.hexdigest()


def is_imbalanced(counts: list[int]) -> bool:
    """Whether the largest class has over twice its even share of the images; of two classes, over two thirds. Among
    many classes a few images more are chance, so that the largest must have ten, or over half of all."""
    present = [count for count in counts if count]
    largest, total = max(present, default=0), sum(present)
    return len(present) > 1 and largest > 2 / max(len(present), 3) * total and (largest >= 10 or largest > total / 2)


def _used_rows(images: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Rows of each split without those whose image or group is in an earlier split."""
    used = {}
    for place, name in enumerate(images):
        leaks = np.zeros(len(images[name]), dtype=bool)
        for earlier in list(images)[:place]:
            leaks |= np.isin(images[name], images[earlier])
            if groups is not None:
                leaks |= np.isin(groups[name], groups[earlier])
        used[name] = np.flatnonzero(~leaks)
    return used


def _nothing_left(name: str, total: int, audit: Audit) -> str:
    earlier = [
        pair.partition("/")[0] for pair, count in audit.duplicates_across.items() if pair.endswith(name) and count
    ]
    earlier += [pair.partition("/")[0] for pair, count in audit.groups_across.items() if pair.endswith(name) and count]
    what = "share an image or a group with" if audit.groups_across else "are copies of images of"
    where = "training" if set(earlier) == {"train"} else "training or validation"
    problem = f"all {total:,} {name} images {what} the {where} split, so that none is left to {_purpose(name)}"
    example = f"{argument('train_split', 'train[:80%]')} and {argument(f'{name}_split', 'train[80%:]')}"
    return f"{problem}; name another split with {argument(f'{name}_split')}, or cut one, as in {example}."


def _purpose(name: str) -> str:
    return "score" if name == "test" else "choose the regularization on"


def _count_shared(groups: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {
        f"{earlier}/{later}": len(np.intersect1d(groups[earlier], groups[later]))
        for earlier, later in PAIRS
        if earlier in groups and later in groups
    }


def _count_classes(audit: Audit, labels: Mapping[str, np.ndarray], names: list[str]) -> None:
    counts = {split: np.bincount(each, minlength=len(names)).tolist() for split, each in labels.items()}
    audit.num_images = {split: len(each) for split, each in labels.items()}
    audit.classes = {label: {name: counts[name][k] for name in counts} for k, label in enumerate(names)}
    audit.missing_classes = {name: [names[k] for k, n in enumerate(each) if not n] for name, each in counts.items()}
    largest = int(np.argmax(counts["train"]))
    audit.majority_class, audit.majority_share = names[largest], counts["train"][largest] / len(labels["train"])
    to_train = np.array(counts["train"]) + np.array(counts.get("validation", 0))
    to_test = np.array(counts.get("test", to_train))
    # A few images of a balanced dataset may be cut into a training and a validation split that are not balanced.
    imbalanced = is_imbalanced(counts["train"]) and is_imbalanced(to_train.tolist())
    audit.imbalanced = imbalanced or is_imbalanced(to_test.tolist())
    few = ((to_train > 0) & (to_train < FEW_IMAGES)) | ((to_test > 0) & (to_test < FEW_IMAGES))
    audit.few_images = [names[k] for k in np.flatnonzero(few)]


def _listed(names: list[str], total: int) -> str:
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    return f"class {shown}" if len(names) == 1 else f"{len(names):,} of {total:,} classes ({shown})"
