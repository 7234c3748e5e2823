"""The file of a selection: every subset of members that was probed, what each member adds, and the conclusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from concat_ensemble.data.naming import METRICS
from concat_ensemble.schema import Count, Number, PositiveCount, Share, Text, check_type
from concat_ensemble.studies.results import (
    VERSION_1_PROBE,
    Cost,
    ProbeRecord,
    ResultsFile,
    check_audit,
    hash_protocol,
    rename_keys,
)

MAX_MEMBERS, MAX_SUBSETS = 256, 100_000
MARGIN = 0.01  # of top-1: the loss that is acceptable by default
# Version 1 (0.1.0) used other names.
VERSION_1_SELECTION = {"widths": "feature_dims", "n_held": "n_held_out", "order": "greedy_order"}
VERSION_1_SUBSET = {"strength": "l2_strength"}


@dataclass
class Subset:
    """A ridge probe of some members, scored on images that it was not fitted on."""

    members: tuple[Count, ...]
    top1: Share
    l2_strength: Number
    cost: Cost
    score: Number = -1.0  # in the metric of the selection; top-1 if it is not given
    loss: Number | None = None  # against all members; None in older files
    loss_interval: tuple[Number, Number] | None = None  # 95%, for all subsets at once
    # What the score is the mean of, for paired intervals: (N,) bool, which images are classified correctly, or for
    # another metric than top-1 (resamples,) values. Empty from a file, which does not store it.
    sample: np.ndarray = field(default_factory=lambda: np.empty(0, bool), repr=False, compare=False)

    def __post_init__(self):
        self.members = tuple(self.members)
        self.score = self.top1 if self.score < 0 else self.score


@dataclass
class Contribution:
    """What is lost without a member, in shares of top-1, each with its 95% interval over the images."""

    member: Count
    chosen: bool
    # All members minus the chosen ones without this one. Within a budget that excludes all that is good enough (and in
    # files before 0.2): the chosen members with it minus those without it.
    gain: Number
    gain_interval: tuple[Number, Number]
    # Mean gain over all orders of adding members (Shapley 1953); None where not all subsets were probed.
    shapley: Number | None
    shapley_interval: tuple[Number, Number] | None
    margin: Number = MARGIN

    @property
    def advice(self) -> str:
        """`drop` if the loss is below the margin with 95% confidence, `keep` if there is one beyond chance, else
        `cannot tell`."""
        low, high = self.gain_interval
        if high < self.margin and not self.chosen:
            return "drop"
        return "keep" if low > 0 else "cannot tell"


@dataclass
class Selection(ResultsFile):
    """Subsets of an ensemble's members on a dataset, best first, and what follows from them.

    Accuracies are those of ridge probes by cross-validation over training and validation images (in files before 0.2:
    on the validation images); the test split is never read.
    """

    FILE_KIND, REMEDY = "selection", "select again with --overwrite"

    names: Annotated[list[Text], Meta(min_length=1, max_length=MAX_MEMBERS)]
    feature_dims: list[Count]
    costs: list[Cost]
    subsets: Annotated[list[Subset], Meta(min_length=1, max_length=MAX_SUBSETS)]
    contributions: list[Contribution]
    similarity: list[list[Number]]  # linear CKA between members (Kornblith et al. 2019); 1 for the same features
    best: tuple[Count, ...]
    # The next best member each time, its gain over the members before it, and the gain's 95% interval.
    greedy_order: list[tuple[Count, Number, tuple[Number, Number]]]
    n_train: Count
    n_held_out: PositiveCount
    probe: dict[str, Any]  # the settings of the probes
    margin: Number | None = None  # the loss against all members that is acceptable; None in older files
    over_budget: bool = False  # whether the budget excludes every subset that is shown to be within the margin
    # The cheaper subset that the fewest more images could show to be within the margin, and about how many.
    undecided: tuple[Count, ...] | None = None
    images_needed: int | None = None
    n_groups: Count | None = None  # of the images; None where each is independent
    audit: dict[str, Any] | None = None  # of the dataset, as `Audit.to_dict` gives it

    @property
    def protocol(self) -> str:
        """Eight characters that agree only where probes and held-out images do."""
        return hash_protocol(probe=self.probe, images=[self.n_train, self.n_held_out])

    @property
    def metric(self) -> str:
        return self.probe.get("metric", "top1")

    def __getitem__(self, members: Sequence[int]) -> Subset:
        return next(subset for subset in self.subsets if subset.members == tuple(sorted(members)))

    @property
    def verdict(self) -> str:
        """What to do, in words."""
        return " ".join(self.paragraphs)

    @property
    def paragraphs(self) -> list[str]:
        """The verdict's parts: what to choose, each member, and which members are alike."""
        paragraphs = [" ".join([self._describe_choice(), *self._describe_better()])]
        if len(self.names) > 1:
            paragraphs.append(" ".join(self._describe(contribution) for contribution in self.contributions))
            pairs = [(self.similarity[a][b], a, b) for a in range(len(self.names)) for b in range(a)]
            cka, a, b = max(pairs)
            paragraphs.append(f"Members {b} and {a} are the most alike (CKA {cka:.2f}).")
        return paragraphs

    def _describe_choice(self) -> str:
        whole, best = self[range(len(self.names))], self[self.best]
        everyone, chosen = f"all {len(self.names)} members", format_members(self.best)
        if best is whole:
            return f"Keep {everyone}: {self._describe_undecided()}"
        cost = f"at {best.cost.gflops:.2g} of {whole.cost.gflops:.2g} GFLOPs"
        if best.loss is None or best.loss_interval is None or self.margin is None:  # an older file
            return f"Subset {chosen} reaches {100 * best.top1:.1f}, {everyone} {100 * whole.top1:.1f}, {cost}."
        loss = f"{100 * best.loss:.1f} points {format_interval(best.loss_interval)}"
        if self.over_budget:
            return (
                f"No subset within the budget is shown to lose less than {_format_margin(self.margin)}: {chosen} is "
                f"the best of them, {cost}, and is expected to lose {loss} against {everyone}."
            )
        choice = f"Choose {chosen}, {cost}: it loses {loss} against {everyone}, which is below the margin of "
        return f"{choice}{_format_margin(self.margin)} with 95% confidence."

    def _describe_better(self) -> list[str]:
        """Members that do harm give room to drop others, since the loss is one against all members."""
        top, best = self.subsets[0], self[self.best]
        if self.margin is None or self.over_budget or top.score - best.score <= self.margin:
            return []
        better = f"{format_members(top.members)} ({top.cost.gflops:.2g} GFLOPs)"
        points = f"{100 * (top.score - best.score):.1f} points"
        return [f"The best of all {len(self.subsets)} subsets is {better}, {points} above it, in part by luck."]

    def _describe_undecided(self) -> str:
        """Why no smaller subset is chosen, and what could change that."""
        if self.margin is None:
            return "no smaller subset does as well."
        images = f"{self.n_held_out:,} images" + (f" in {self.n_groups:,} groups" if self.n_groups else "")
        margin = _format_margin(self.margin)
        reason = f"these {images} do not show of any smaller subset that it loses less than {margin}"
        subset = None if self.undecided is None else self[self.undecided]
        if subset is None or subset.loss is None or subset.loss_interval is None:
            return f"{reason}, and every one of them loses more than that here."
        number, groups = _round_up(self.images_needed or 1), ""
        if self.n_groups:
            groups = f" in about {_round_up(-(-number * self.n_groups // self.n_held_out)):,} new groups"
        loss = f"{100 * subset.loss:.1f} points {format_interval(subset.loss_interval)}"
        return (
            f"{reason}. {format_members(subset.members)} ({subset.cost.gflops:.2g} GFLOPs) loses {loss} here; about "
            f"{number:,} more labelled images{groups}, of the same kind and classes as the training images, could "
            "settle it."
        )

    def _describe(self, contribution: Contribution) -> str:
        """The advice about one member, with the loss that it rests on."""
        member, chosen = contribution.member, contribution.chosen
        advice = {"cannot tell": "Cannot tell about"}.get(contribution.advice, contribution.advice.capitalize())
        loss = f"{100 * contribution.gain:.1f} points {format_interval(contribution.gain_interval)}"
        dropped = [one.member for one in self.contributions if not one.chosen]
        if self.over_budget or self.margin is None:
            others = [k for k in self.best if k != member]
            compared = f"it adds {loss} {'to ' + format_members(others) if others else 'to guessing'}"
            compared += "" if chosen or contribution.advice == "drop" else ", but the budget leaves it out"
        elif chosen:
            compared = f"without it{' too' if dropped else ''} the loss is {loss}"
        else:
            compared = f"the loss without {'it' if len(dropped) == 1 else format_members(dropped)} is {loss}"
        return f"{advice} member {member} ({self.names[member]}): {compared}."

    @property
    def outlook(self) -> str:
        """The conclusion of a quick selection: where to stop, and what only more images can tell."""
        sentences = []
        if len(self.best) < len(self.names) and not self.over_budget:
            sentences.append(f"Stop at K = {len(self.best)}: {format_members(self.best)}.")
        if unsure := [str(part.member) for part in self.contributions if part.advice == "cannot tell"]:
            *others, last = unsure
            members = f"members {', '.join(others)} and {last}" if others else f"member {last}"
            sentences.append(f"{self.n_held_out:,} images cannot tell whether {members} can go; use more to know.")
        return " ".join(sentences) or "Each member is needed; more images would hardly change that."

    def save(self, path: Path) -> None:
        content = dataclasses.asdict(self)
        for subset in content["subsets"]:
            del subset["sample"]
        self._write(path, {"protocol": self.protocol, **content})

    @classmethod
    def upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        return rename_keys(content, VERSION_1_SELECTION) | {
            "probe": rename_keys(content["probe"], VERSION_1_PROBE),
            "subsets": [rename_keys(subset, VERSION_1_SUBSET) for subset in content["subsets"]],
        }

    def check(self, content: dict[str, Any]) -> None:
        check_type(self.probe, ProbeRecord, "probe")
        if self.metric not in METRICS:
            raise ValueError(f"its metric {self.metric!r} is unknown")
        if self.audit is not None:
            check_audit(self.audit)
        count, subsets = len(self.names), {subset.members for subset in self.subsets}
        if {len(self.feature_dims), len(self.costs), len(self.similarity), *map(len, self.similarity)} != {count}:
            raise ValueError(f"its feature_dims, costs and similarity must be those of its {count} members")
        if {contribution.member for contribution in self.contributions} != set(range(len(self.names))):
            raise ValueError("its contributions must be those of its members")
        if not {self.best, self.undecided or self.best, tuple(range(count))} <= subsets:
            raise ValueError("its best subset, and that of all members, must be among its subsets")


def format_interval(interval: tuple[float, float]) -> str:
    """`[-0.3, 1.2]`, in points."""
    low, high = interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _format_margin(margin: float) -> str:
    points = f"{100 * margin:.3g}"
    return f"{points} point" if points == "1" else f"{points} points"


def _round_up(number: int) -> int:
    """To two digits, since it is an estimate."""
    step = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // step) * step


def format_members(members: Sequence[int]) -> str:
    """`0+2`, as figures and tables name a subset."""
    return "+".join(map(str, members))
