"""Does fine-tuning near the pretrained point close the gap to a concatenation? (Section 2 of the paper: it is linear probing of tangent features.)

    .venv/bin/python training/compare.py scattered_digits && .venv/bin/python training/ntk_gap.py scattered_digits

Takes the networks that compare.py trained, in all its repeats, and probes the unseen digits on the gradients of CAT1 (neural tangent kernel features,
hashed to 2,048 columns) beside the plain features of CAT1 and CAT4; with them by PCA at CAT4's width, the gradients of an untrained network, which need no
pretraining at all, and those of CAT4. Prints a table; each repeat is kept in a file and not done again.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from concat_ensemble.experiments.compare import IMAGES, SUBJECT, data_of, kept, to_the_end, told, two_at_a_time
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.ntk import NTK
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.controls import untrained_like

COLUMNS = 2_048  # for each system, so that CAT4's four members get a quarter each
SINGLE = "cat1"
GRADIENTS = ", gradients"
NARROW = SINGLE + GRADIENTS + f", PCA to {SUBJECT}'s width"
SYSTEMS = (SINGLE, SUBJECT, SINGLE + GRADIENTS, SUBJECT + GRADIENTS, "untrained cat1", "untrained cat1" + GRADIENTS)


@dataclass(frozen=True)
class Gap:
    """Where the networks are, and what they are probed on."""

    study: str
    dataset: str
    networks: Path  # compare.py's output
    output: Path
    smoke: bool = False

    def measured(self, seed: int) -> dict[str, float]:
        """Top-1 by system in one repeat; read where it was measured before."""
        asked = {"asked": [self.study, self.dataset, seed, COLUMNS]}
        return kept(self.output / f"ntk-seed-{seed}.json", asked, lambda: self._probed(seed))

    def _probed(self, seed: int) -> dict[str, float]:
        folder = self.networks / f"seed-{seed}"
        models = {name: assemble(folder / name) for name in (SINGLE, SUBJECT)}
        models["untrained cat1"] = untrained_like(models[SINGLE], seed)
        data = data_of(self.study, self.dataset, "unseen", seed, self.smoke)
        tables = {}
        for system in SYSTEMS:
            model = models[system.removesuffix(GRADIENTS)]
            ntk = NTK(dim=COLUMNS // len(model.members), seed=seed) if system.endswith(GRADIENTS) else None
            tables[system] = extract_features(model, data, store=folder / "features", quiet=True, ntk=ntk)
        gradients = tables[SINGLE + GRADIENTS]
        tables[NARROW] = principal_projection(gradients, sum(tables[SUBJECT].feature_dims))(gradients)
        found = {}
        for system, table in tables.items():
            probe = LinearProbe(standardize=system != NARROW, seed=seed)
            probe.fit(table["train"], validation=table["validation"])
            found[system] = probe.score(table["test"])
        return found

    def run(self, repeats: int) -> dict[str, np.ndarray]:
        """(repeats,) top-1 of each system, two repeats at a time."""
        missing = [seed for seed in range(repeats) if not (self.networks / f"seed-{seed}" / SUBJECT).is_dir()]
        if missing:
            raise RuntimeError(
                f"{self.networks} has no networks of seed {missing[0]}; train them with training/compare.py {self.study}."
            )
        measured = two_at_a_time(self.measured, range(repeats))
        return {system: np.array([repeat[system] for repeat in measured]) for system in measured[0]}


def table_of(top1: dict[str, np.ndarray]) -> str:
    """In Markdown, from the worst to the best."""
    lines = ["| | unseen 5 to 9 | minus cat1, paired | cat4 minus it, paired |", "|---|---|---|---|"]
    for system in sorted(top1, key=lambda system: top1[system].mean()):
        paired = [
            "" if system == other else told(sign * (top1[system] - top1[other]), "+")
            for other, sign in ((SINGLE, 1), (SUBJECT, -1))
        ]
        lines.append(f"| {system} | {told(top1[system])} | {' | '.join(paired)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("scattered_digits", "scattered_mnist"))
    parser.add_argument("--repeats", type=int, default=5, help="seeds 0, 1, 2, ... (two at a time)")
    parser.add_argument("--networks", type=Path, help="compare.py's output; runs/STUDY when left out")
    parser.add_argument("--output", type=Path, help="for the numbers; beside the networks when left out")
    parser.add_argument("--dataset", help="where the images are, such as parquet:FOLDER; on the Hub when left out")
    options = parser.parse_args()
    if options.repeats < 2:
        sys.exit(f"error: --repeats {options.repeats}: an interval needs at least 2.")
    networks = options.networks or Path("runs") / options.study
    gap = Gap(options.study, options.dataset or IMAGES[options.study][0], networks, options.output or networks)
    table = table_of(gap.run(options.repeats))
    (gap.output / "ntk.md").write_text(table)
    print(f"{table}\nTop-1 in %, mean of {options.repeats} repeats [95% t-interval]")


if __name__ == "__main__":
    to_the_end(main)
