"""The file of a selection: every subset of members that was probed, what each member adds, and the conclusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from concat_ensemble.studies.results import VERSION_1_PROBE, Cost, ResultsFile, hash_protocol, rename_keys

# tests/benchmarks/quick_selection.py, on three members and MNIST: of the 95% intervals 84% contained the true value at
# 250 images, 93% at 500 and at 1,000.
FEW_IMAGES = 500
NEGLIGIBLE = 0.005  # of top-1: a gain of less than half a point that may be chance is not worth a member's cost
# Version 1 (0.1.0) used other names.
VERSION_1_SELECTION = {"widths": "feature_dims", "n_held": "n_held_out", "order": "greedy_order"}
VERSION_1_SUBSET = {"strength": "l2_strength"}


@dataclass
class Subset:
    """A ridge probe of some members, scored on images that it was not fitted on."""

    members: tuple[int, ...]
    top1: float
    l2_strength: float
    cost: Cost
    # (N,) bool for each held-out image; empty from a file, which does not store it
    correct: np.ndarray = field(default_factory=lambda: np.empty(0, bool), repr=False, compare=False)

    def __post_init__(self):
        self.members = tuple(self.members)


@dataclass
class Contribution:
    """What a member adds, in shares of top-1, each with its 95% bootstrap interval over the held-out images."""

    member: int
    chosen: bool
    gain: float  # of the chosen members with it over those without it
    gain_interval: tuple[float, float]
    # Mean gain over all orders of adding members (Shapley 1953); None where not all subsets were probed.
    shapley: float | None
    shapley_interval: tuple[float, float] | None

    @property
    def advice(self) -> str:
        """`keep`, `not sure`, `beyond the budget` or `drop`."""
        beyond_chance = self.gain_interval[0] > 0
        if self.chosen:
            return "keep" if beyond_chance else "not sure"
        return "beyond the budget" if beyond_chance else "drop"


@dataclass
class Selection(ResultsFile):
    """Subsets of an ensemble's members on a dataset, best first, and what follows from them.

    Accuracies are those of ridge probes on held-out training images; the test split is never read.
    """

    FILE_KIND, REMEDY = "selection", "select again with --overwrite"

    names: list[str]
    feature_dims: list[int]
    costs: list[Cost]
    subsets: list[Subset]
    contributions: list[Contribution]
    similarity: list[list[float]]  # linear CKA between members (Kornblith et al. 2019); 1 for the same features
    best: tuple[int, ...]
    # The next best member each time, its gain over the members before it, and the gain's 95% interval.
    greedy_order: list[tuple[int, float, tuple[float, float]]]
    n_train: int
    n_held_out: int
    probe: dict[str, Any]  # the settings of the probes

    @property
    def protocol(self) -> str:
        """Eight characters that agree only where probes and held-out images do."""
        return hash_protocol(probe=self.probe, images=[self.n_train, self.n_held_out])

    def __getitem__(self, members: Sequence[int]) -> Subset:
        return next(subset for subset in self.subsets if subset.members == tuple(sorted(members)))

    @property
    def verdict(self) -> str:
        """What to do, in words."""
        sentences = []
        if len(self.names) > 1:
            sentences += [self._describe(contribution) for contribution in self.contributions]
            pairs = [(self.similarity[a][b], a, b) for a in range(len(self.names)) for b in range(a)]
            cka, a, b = max(pairs)
            sentences.append(f"Members {b} and {a} are the most alike (CKA {cka:.2f}).")
        whole, best = self[range(len(self.names))], self[self.best]
        if best is not whole:
            sentences.append(
                f"Subset {format_members(best.members)} reaches {100 * best.top1:.1f}, all {len(self.names)} members "
                f"{100 * whole.top1:.1f}, at {best.cost.gflops:.2f} of {whole.cost.gflops:.2f} GFLOPs."
            )
        return " ".join(sentences)

    def _describe(self, contribution: Contribution) -> str:
        """The advice about one member, with the gain that it rests on."""
        member = contribution.member
        low, high = (100 * bound for bound in contribution.gain_interval)
        others = [k for k in self.best if k != member]
        advice = {"not sure": "Not sure about", "beyond the budget": "No budget for"}
        action = advice.get(contribution.advice, contribution.advice.capitalize())
        baseline = f"when added to {format_members(others)}" if others else "over guessing"
        gain = f"{100 * contribution.gain:.1f} points [{low:.1f}, {high:.1f}]"
        return f"{action} member {member} ({self.names[member]}): its gain is {gain} {baseline}."

    @property
    def outlook(self) -> str:
        """The conclusion of a quick selection: where to stop, and how reliable that is."""
        sentences = [f"Stop at K = {len(self.best)}: {format_members(self.best)}."]
        for contribution in self.contributions:
            low, high = contribution.gain_interval
            if low <= 0 and high > NEGLIGIBLE:
                sentences.append(
                    f"{self.n_held_out:,} images cannot tell whether member {contribution.member} adds "
                    f"{max(100 * low, 0):.1f} or {100 * high:.1f} points."
                )
        if self.n_held_out < FEW_IMAGES:
            sentences.append(f"Intervals from fewer than {FEW_IMAGES} images are too narrow; trust them less.")
        return " ".join(sentences)

    def save(self, path: Path) -> None:
        content = dataclasses.asdict(self)
        for subset in content["subsets"]:
            del subset["correct"]
        self._write(path, {"protocol": self.protocol, **content})

    @classmethod
    def upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        return rename_keys(content, VERSION_1_SELECTION) | {
            "probe": rename_keys(content["probe"], VERSION_1_PROBE),
            "subsets": [rename_keys(subset, VERSION_1_SUBSET) for subset in content["subsets"]],
        }

    def check(self, content: dict[str, Any]) -> None:
        if {contribution.member for contribution in self.contributions} != set(range(len(self.names))):
            raise ValueError("its contributions must be those of its members")
        if self.best not in [subset.members for subset in self.subsets]:
            raise ValueError("its best subset must be one of its subsets")


def format_members(members: Sequence[int]) -> str:
    """`0+2`, as figures and tables name a subset."""
    return "+".join(map(str, members))
