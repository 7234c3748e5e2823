"""The file of a comparison: how much of each member's features the others predict, and the conclusions in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from concat_ensemble.schema import Count, Number, Share, Text, check_type
from concat_ensemble.studies.results import DatasetSettings, ResultsFile, rename_keys

MAX_SUBJECTS = 256
REPEAT_R2 = 0.9  # a subject with this mean R2 or more repeats the others
DEAD_SHARE = 0.01  # a feature is dead if it deviates less than this share of its subject's root mean square deviation
# Version 1 (0.1.0) used other names.
VERSION_1_OVERLAP = {"guessing": "majority_share"}
VERSION_1_SUBJECT = {"width": "num_features", "dead": "dead_share"}
VERSION_1_RELATION = {
    "given": "sources",
    "source": "source_name",
    "wanted": "target",
    "features": "feature_r2",
    "rest_top1": "residual_top1",
    "rest_interval": "residual_interval",
}


@dataclass
class Subject:
    """A member, or an ensemble as a whole, by itself."""

    name: Text
    num_features: Count
    dead_share: Share  # share of its features that are dead
    effective_rank: Number  # exp of the entropy of the covariance's eigenvalues (Roy and Vetterli 2007)
    top1: Share  # of a linear probe, on the held-out images


@dataclass
class Relation:
    """How well the features of the subjects `sources`, side by side, predict those of the subject `target`."""

    sources: tuple[Count, ...]
    source_name: Text
    target: Count
    cka: Number
    r2: Number  # mean over living features; a feature predicted worse than by its mean counts 0
    untrained_r2: Number | None  # the same with untrained networks in place of `sources`; None without such a control
    feature_r2: list[Number | None]  # R2 of each feature; None for dead ones
    residual_top1: Share  # of a linear probe of the residual, which `sources` do not predict, on the held-out images
    residual_interval: tuple[Share, Share]  # 95%, Wilson's


@dataclass
class Overlap(ResultsFile):
    """Each subject's relations to the others, from the most predictive one on, then to all of them together."""

    FILE_KIND, REMEDY = "comparison", "compare again with --overwrite"

    subjects: Annotated[list[Subject], Meta(min_length=1, max_length=MAX_SUBJECTS)]
    relations: Annotated[list[Relation], Meta(max_length=MAX_SUBJECTS**2)]
    majority_share: Share  # share of the most frequent class of the held-out images
    n_train: Count
    n_validation: Count
    n_test: Count  # held-out images; half of the training and validation images, where a command compared
    dataset: dict[str, Any] = field(default_factory=dict)  # see `DatasetSettings`
    command: Text = ""

    @property
    def verdict(self) -> list[str]:
        """A sentence for each subject: which one it repeats, or what it has that the others lack."""
        sentences = [self._describe(k) for k in range(len(self.subjects))]
        if min(self.n_train, self.n_test) < sum(subject.num_features for subject in self.subjects):
            sentences.append("There are fewer images than features: R2 and the top-1 of residuals are underestimated.")
        return sentences

    def _describe(self, k: int) -> str:
        """The sentence about subject `k`, from the first relation that makes it a repeat, else from all the others."""
        subject, relations = self.subjects[k], [relation for relation in self.relations if relation.target == k]
        repeats = [relation for relation in relations if relation.r2 >= REPEAT_R2]
        relation = repeats[0] if repeats else relations[-1]
        low, high = (100 * bound for bound in relation.residual_interval)
        control = "" if relation.untrained_r2 is None else f"{relation.untrained_r2:.2f} from untrained networks; "
        if repeats and (relation.untrained_r2 or 0.0) >= REPEAT_R2:
            finding = "repeats, as untrained networks do,"
        elif repeats:
            finding = "repeats"
        elif low > 100 * self.majority_share:
            finding = "has features that help on this dataset beyond"
        else:
            finding = "has no features shown to help on this dataset beyond"
        return (
            f"{subject.name} {finding} {relation.source_name}: R2 {relation.r2:.2f} ({control}"
            f"{REPEAT_R2} or more is a repeat). Top-1 is {100 * relation.residual_top1:.1f} [{low:.1f}, {high:.1f}] "
            f"from its residual, {100 * subject.top1:.1f} from all its features, and {100 * self.majority_share:.1f} "
            f"by guessing."
        )

    def save(self, path: Path, *, command: str = "", dataset: dict[str, Any] | None = None) -> None:
        """Write the comparison as JSON, with the command and the dataset that gave it."""
        content = dataclasses.asdict(dataclasses.replace(self, command=command, dataset=dataset or {}))
        thresholds = {"repeat_r2": REPEAT_R2, "dead_share": DEAD_SHARE}
        self._write(path, {**content, **thresholds, "verdict": self.verdict})

    @classmethod
    def upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        return rename_keys(content, VERSION_1_OVERLAP) | {
            "subjects": [rename_keys(subject, VERSION_1_SUBJECT) for subject in content["subjects"]],
            "relations": [rename_keys(relation, VERSION_1_RELATION) for relation in content["relations"]],
        }

    def check(self, content: dict[str, Any]) -> None:
        check_type(self.dataset, DatasetSettings, "dataset")
        if {relation.target for relation in self.relations} != set(range(len(self.subjects))):
            raise ValueError("its relations must be about each of its subjects")
