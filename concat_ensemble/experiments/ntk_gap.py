"""Does fine-tuning near the pretrained point, which is probing of tangent features, close the gap to a concatenation?

    python -m concat_ensemble.experiments.compare scattered_digits
    python -m concat_ensemble.experiments.ntk_gap scattered_digits

Probes the unseen digits on the gradients of the CAT1 network that the first command trained (neural tangent kernel
features, hashed to 2,048 features), beside the plain features of CAT1 and CAT4. Also probed: these gradients by PCA at
CAT4's number of features, the gradients of an untrained network, which need no pretraining at all, and those of CAT4.
Every repeat is measured once and stored in a file. Prints a table.
"""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from concat_ensemble.experiments import desk
from concat_ensemble.experiments.desk import SUBJECT
from concat_ensemble.experiments.names import STUDIES
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.ntk import NTK
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.members.assemble import assemble
from concat_ensemble.studies.controls import untrained_like

NUM_FEATURES = 2_048  # of each system, so that CAT4's four members get a quarter each
SINGLE, UNTRAINED = "cat1", "untrained cat1"
GRADIENTS = ", gradients"
PROJECTED = f"{SINGLE}{GRADIENTS}, PCA to {SUBJECT}'s width"
SYSTEMS = (SINGLE, SUBJECT, SINGLE + GRADIENTS, SUBJECT + GRADIENTS, UNTRAINED, UNTRAINED + GRADIENTS)


def measure_repeat(setup: desk.Setup, networks: Path, seed: int) -> dict[str, float]:
    """Top-1 by system in one repeat, from its file if it has been measured before."""
    settings = {"asked": [setup.study, setup.dataset, seed, NUM_FEATURES]}
    path, folder = setup.output / f"ntk-seed-{seed}.json", networks / f"seed-{seed}"
    return desk.measure_once(path, settings, lambda: probe_networks(setup, folder, seed))


def probe_networks(setup: desk.Setup, folder: Path, seed: int) -> dict[str, float]:
    """Top-1 of all systems on the unseen digits."""
    models = {name: assemble(folder / name) for name in (SINGLE, SUBJECT)}
    models[UNTRAINED] = untrained_like(models[SINGLE], seed)
    data = setup.load_task("unseen", seed)
    tables = {}
    for system in SYSTEMS:
        model = models[system.removesuffix(GRADIENTS)]
        ntk = NTK(dim=NUM_FEATURES // len(model.members), seed=seed) if system.endswith(GRADIENTS) else None
        tables[system] = extract_features(model, data, store=folder / "features", quiet=True, ntk=ntk)
    gradients = tables[SINGLE + GRADIENTS]
    tables[PROJECTED] = principal_projection(gradients, sum(tables[SUBJECT].feature_dims))(gradients)
    return desk.probe_tables(tables, seed, projected=PROJECTED)


def measure_gap(setup: desk.Setup, networks: Path, repeats: int) -> dict[str, np.ndarray]:
    """(repeats,) top-1 of each system, two repeats at a time.

    Args:
        setup: Its output folder gets the numbers.
        networks: The output folder of `compare`.

    Raises:
        ValueError: when a repeat has no networks.
    """
    for seed in range(repeats):
        if not (networks / f"seed-{seed}" / SUBJECT).is_dir():
            command = f"python -m concat_ensemble.experiments.compare {setup.study}"
            raise ValueError(f"{networks} has no networks of seed {seed}; train them with {command}.")
    measured = desk.map_two_at_a_time(partial(measure_repeat, setup, networks), range(repeats))
    return {system: np.array([top1[system] for top1 in measured]) for system in measured[0]}


def format_table(top1: dict[str, np.ndarray]) -> str:
    """A Markdown table, from the worst system to the best."""
    rows = []
    for system in sorted(top1, key=lambda system: top1[system].mean()):
        gain = "" if system == SINGLE else desk.format_difference(top1[system] - top1[SINGLE])
        loss = "" if system == SUBJECT else desk.format_difference(-1 * (top1[system] - top1[SUBJECT]))
        rows.append([system, desk.format_mean(top1[system]), gain, loss])
    return desk.format_markdown(["", "unseen 5 to 9", f"minus {SINGLE}, paired", f"{SUBJECT} minus it, paired"], rows)


def main() -> None:
    parser = desk.create_parser(__doc__, repeats=5, studies=STUDIES)
    parser.add_argument("--networks", type=Path, help="output folder of compare (default: runs/STUDY)")
    options = parser.parse_args()
    desk.check_at_least("repeats", options.repeats, 2)
    study, dataset = options.study, options.dataset
    setup = desk.create_setup(study, dataset, options.networks, name=study, smoke=options.smoke)
    networks = setup.output
    if options.output:
        setup = dataclasses.replace(setup, output=options.output)
    table = format_table(measure_gap(setup, networks, options.repeats))
    (setup.output / "ntk.md").write_text(table)
    desk.print_table(table, options.repeats)


if __name__ == "__main__":
    desk.run_script(main)
