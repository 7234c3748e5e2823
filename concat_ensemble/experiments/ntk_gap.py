"""Does fine-tuning near the pretrained point, which is probing of tangent features, close the gap to a concatenation?

    concat-ensemble reproduce ntk
    python -m concat_ensemble.experiments.ntk_gap scattered_mnist --repeats 6

Trains CAT1 and CAT4 for as many steps (`reproduce` takes those of Figure 6), and probes the unseen digits on gradients
(neural tangent kernel features, hashed to 2,048 columns) beside plain features: gradients of a random combination of
the pooled features, of all parameters and of one layer's, and gradients of the logits of the probe on these features,
summed over the classes (the sum of the kernels), also by PCA at CAT4's number of features. The gradients of CAT4 have
as many columns. Beside them: CAT1 and CAT4 fine-tuned, with labels of the same images, and gradients of an untrained
network, which need no pretraining at all. Every repeat has other networks and other test images, is measured once and
stored in a file. Prints a table.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from datasets import DatasetDict

from concat_ensemble.errors import check_at_least
from concat_ensemble.experiments import desk
from concat_ensemble.experiments.desk import SUBJECT
from concat_ensemble.experiments.names import STUDIES
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.ntk import NTK
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.results import RESULTS, Results

STEPS = 1_600  # of CAT1, and of CAT4's members together, where they are trained here
NUM_FEATURES = 2_048  # of each system's gradients, so that CAT4's four members get a quarter each
SINGLE, UNTRAINED = "cat1", "untrained cat1"
RANDOM, OWN, TUNED = ", gradients", ", gradients of logits", ", fine-tuned"
PROJECTED = f"{SINGLE}{OWN}, PCA to {SUBJECT}'s features"
Train = Callable[[int], Path]
LAYERS = {"the stem": "^(conv1|bn1)", **{f"layer {n}": rf"^layer{n}\." for n in range(1, 5)}}  # regular expressions


def train_networks(setup: desk.Setup, seed: int) -> Path:
    """The folder of CAT1 and CAT4 of `STEPS` steps, trained if they are not there."""
    folder = setup.output / f"seed-{seed}"
    setup.train(desk.plan_members(folder, f"CAT1 and CAT4, {STEPS:,} steps each", (1, 4), STEPS), seed)
    return folder


def measure_repeat(setup: desk.Setup, train: Train, seed: int) -> dict[str, float]:
    """Top-1 by system in one repeat, from its file if it has been measured before."""
    settings = {"asked": [setup.study, setup.dataset, seed, NUM_FEATURES]}

    def measure() -> dict[str, float]:
        networks, own = train(seed), setup.output / f"seed-{seed}"
        return tune_networks(setup, networks, own, seed) | probe_networks(setup, networks, own, seed)

    return desk.measure_once(setup.output / f"ntk-seed-{seed}.json", settings, measure)


def tune_networks(setup: desk.Setup, networks: Path, folder: Path, seed: int) -> dict[str, float]:
    """Top-1 of the fine-tuned networks."""
    top1 = {}
    for name in (SINGLE, SUBJECT):
        tuned = folder / "tuned" / name
        options = {"dataset": f"scattered:{setup.dataset}", "model": str(networks / name), "stages": "one"}
        setup.train(desk.Training("finetuning", "finetune", tuned, f"fine-tune {name}", options), seed)
        (row,) = Results.load(tuned / "whole" / RESULTS / "fine-tuned.json").rows
        top1[name + TUNED] = float(row.top1.mean())
    return top1


def probe_networks(setup: desk.Setup, networks: Path, folder: Path, seed: int) -> dict[str, float]:
    """Top-1 of all probes on the unseen digits."""
    models = {name: assemble(networks / name) for name in (SINGLE, SUBJECT)}
    models[UNTRAINED] = untrained_like(models[SINGLE], seed)
    data = setup.load_task("unseen", seed)
    extract = partial(extract_features, store=folder / "features", quiet=True)
    of_logits = partial(logit_gradients, seed=seed, store=folder / "features")
    tables = {"raw pixels": pixel_table(data, "L", quiet=True)}
    for name, model in models.items():
        tables[name] = extract(model, data)
        tables[name + RANDOM] = extract(model, data, ntk=NTK(_columns(model), seed=seed))
        tables[name + OWN] = of_logits(model, data, tables[name])
    for layer, parameters in LAYERS.items():
        ntk = NTK(NUM_FEATURES, parameters, seed=seed)
        tables[f"{SINGLE}{RANDOM} by {layer}"] = extract(models[SINGLE], data, ntk=ntk)
    gradients = tables[SINGLE + OWN]
    tables[PROJECTED] = principal_projection(gradients, sum(tables[SUBJECT].feature_dims))(gradients)
    return desk.probe_tables(tables, seed, projected=PROJECTED)


def logit_gradients(
    model: ConcatEnsembleModel,
    data: DatasetDict,
    table: FeatureTable,
    *,
    seed: int,
    store: Path | None = None,
) -> FeatureTable:
    """Gradients of the logits of a linear probe on the pooled features `table`, summed over the classes."""
    probe = LinearProbe(seed=seed).fit(table["train"], validation=table["validation"])
    ntk = NTK(_columns(model), seed=seed, head=probe.coef_ / probe.scale_)
    return extract_features(model, data, ntk=ntk, store=store, quiet=True)


def _columns(model: ConcatEnsembleModel) -> int:
    """Of each member's gradients."""
    return NUM_FEATURES // len(model.members)


def measure_gap(setup: desk.Setup, repeats: int, train: Train | None = None) -> dict[str, np.ndarray]:
    """(repeats,) top-1 of each system, two repeats at a time. `train` returns the folder of a seed's CAT1 and CAT4;
    default: `train_networks`."""
    setup.output.mkdir(parents=True, exist_ok=True)
    measure = partial(measure_repeat, setup, train or partial(train_networks, setup))
    measured = desk.map_two_at_a_time(measure, setup.seeds(repeats))
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
    parser = desk.create_parser(__doc__, repeats=6, studies=STUDIES)
    options = parser.parse_args()
    check_at_least("repeats", options.repeats, 2)
    name = f"{options.study}_ntk"
    setup = desk.create_setup(options.study, options.dataset, options.output, name=name, smoke=options.smoke)
    table = format_table(measure_gap(setup, options.repeats))
    (setup.output / "ntk.md").write_text(table)
    desk.print_table(table, options.repeats)


if __name__ == "__main__":
    desk.run_script(main)
