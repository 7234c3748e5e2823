"""Train the members of time-concatenated ensembles and the networks they are compared with, then assemble them.

    accelerate launch training/pretrain_members.py training/recipes/scattered_digits_timecat.yaml

writes `members/NAME-K` (timm's own layout) for each network and `cat1`, `cat2`, ..., `w2`, `cat4-s` (ensembles that
`AutoModel.from_pretrained` loads). The same command continues a run that was stopped and skips finished networks.
`--plan` prints what the run would cost, and stops. Without a clone, start the installed module:

    accelerate launch -m concat_ensemble.training.pretraining RECIPE.yaml

With several processes, `--parallelism data` trains each network on all of them; `--parallelism members` trains as many
networks at a time as there are processes, which exchange nothing. Several processes on the CPU need `accelerate launch
--multi_gpu --num_processes N` with this script's own `--cpu`, because accelerate's `--cpu` starts one process.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from concat_ensemble.console import out
from concat_ensemble.errors import first_line
from concat_ensemble.files import without_folders
from concat_ensemble.members.assemble import assemble
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.studies.ensemble_folders import TRAINING_FIGURE
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.evaluation import evaluate
from concat_ensemble.training.images import Images
from concat_ensemble.training.ledger import MEASURED_STEPS, PlannedEnsemble, Size, print_plan, seconds_per_step
from concat_ensemble.training.logbook import LOGS, draw_curves
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.options import PARALLELISM, exit_on_error, launch_command, read_options
from concat_ensemble.training.recipe import Recipe
from concat_ensemble.training.saving import matches_identity, save_network
from concat_ensemble.training.teams import Team

SEEDS_PER_RUN = 1_000
OTHER_ENSEMBLES = ("members", "wide_steps", "wide_model_args", "snapshots")  # fields that other networks depend on
UNWATCHED: dict[str, Any] = {"evaluate_every": 0, "save_best": None, "log_every": 0, "log_with": None}


@dataclasses.dataclass(frozen=True)
class Network:
    """One training: of a member of the ensemble `name`, or of all its members if they are snapshots."""

    name: str
    number: int
    steps: int
    seed: int
    model_args: dict
    snapshots: int = 1

    @property
    def folders(self) -> list[str]:
        """Folders of the members that the training gives."""
        return [f"members/{self.name}-{self.number + k}" for k in range(self.snapshots)]


def plan_networks(recipe: Recipe) -> list[Network]:
    """All networks of a recipe. Seeds do not depend on which other ensembles the recipe has."""
    networks, first = [], recipe.seed * SEEDS_PER_RUN
    for count in sorted(recipe.members):
        steps = recipe.total_steps // count if count > 1 else round(recipe.total_steps * (1 + recipe.baseline_extra))
        seeds = recipe.seeds or [first + count * (count - 1) // 2 + k for k in range(count)]
        networks += [Network(f"cat{count}", k, steps, seed, recipe.model_args) for k, seed in enumerate(seeds)]
    last = first + SEEDS_PER_RUN - 1
    if recipe.wide_steps:
        networks.append(Network("w2", 0, recipe.wide_steps, last, recipe.model_args | recipe.wide_model_args))
    if recipe.snapshots:
        name = f"cat{recipe.snapshots}-s"
        networks.append(Network(name, 0, recipe.total_steps, last - 1, recipe.model_args, recipe.snapshots))
    return networks


def plan_ensembles(recipe: Recipe) -> dict[str, list[Network]]:
    """The networks of each ensemble."""
    groups = itertools.groupby(plan_networks(recipe), key=lambda network: network.name)
    return {name: list(networks) for name, networks in groups}


def plan_jobs(recipe: Recipe) -> list[list[Network]]:
    """Groups of networks that are trained in one pass over the images."""
    size = recipe.members_per_process
    ensembles = plan_ensembles(recipe).values()
    return [networks[start : start + size] for networks in ensembles for start in range(0, len(networks), size)]


class Objective:
    """Cross-entropy with the recipe's label smoothing, mixup and cutmix, all timm's."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            smoothing = recipe.label_smoothing
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=num_classes)
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(recipe.label_smoothing)

    def __call__(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.mixup:
            images, labels = self.mixup(images, labels)
        return self.loss(network(images), labels)


def create_loop(job: list[Network], recipe: Recipe, images: Images, *, folder: Path, cpu: bool) -> Loop:
    """Create a job's networks, each from its own seed, and the loop that trains them."""
    accelerator, networks, num_classes = create_accelerator(recipe, cpu), [], len(images.class_names)
    for network in job:
        set_seed(network.seed)
        networks.append(timm.create_model(recipe.architecture, num_classes=num_classes, **network.model_args))
    set_seed(job[0].seed, device_specific=True)
    return Loop(
        accelerator,
        recipe,
        networks,
        steps=job[0].steps,
        folder=folder,
        identity=job_identity(job, recipe, images),
        name=f"{job[0].name}-{job[0].number}" + (f" to {job[-1].number}" if len(job) > 1 else ""),
        logs=[log_file(recipe, network) for network in job],
        cycles=job[0].snapshots,
    )


def log_file(recipe: Recipe, network: Network) -> Path:
    return Path(recipe.output) / LOGS / f"{network.name}-{network.number}.csv"


def train(job: list[Network], recipe: Recipe, images: Images, *, cpu: bool) -> None:
    """Train a job's networks and save them."""
    output = Path(recipe.output)
    checkpoints = output / "checkpoints" / f"{job[0].name}-{job[0].number}"
    loop = create_loop(job, recipe, images, folder=checkpoints, cpu=cpu)
    seeds, size = [network.seed for network in job], measure_size(job[0], recipe, images)
    steps = loop.run(
        partial(images.batches, seeds),
        Objective(recipe, len(images.class_names)),
        stops=loop.cycle_ends,
        evaluate=lambda network: evaluate(network, images, loop.accelerator),
    )
    for step in steps:
        models, cycle = loop.networks_to_save(), loop.cycle_ends.index(step)
        if not loop.accelerator.is_main_process:
            continue
        cycle_steps = step - (loop.cycle_ends[cycle - 1] if cycle else 0)
        compute = describe_compute(job, size, cycle_steps * images.images_per_step, loop)
        cost = {"steps": cycle_steps, "compute": compute}
        for k, (network, model) in enumerate(zip(job, models, strict=True)):
            provenance = describe_training(network, recipe, images) | cost | loop.best.describe(k)
            save_network(
                model,
                output / network.folders[cycle],
                architecture=recipe.architecture,
                model_args=network.model_args,
                images=images,
                provenance=provenance | {"command": launch_command()},
                identity=loop.identity,
            )
    loop.finish()


def measure_size(network: Network, recipe: Recipe, images: Images) -> Size:
    return Size.measure(recipe.architecture, network.model_args, recipe.input_size, len(images.class_names))


def describe_compute(job: list[Network], size: Size, num_images: int, loop: Loop) -> dict:
    """Cost of each network of a job."""
    accelerator = loop.accelerator
    return {
        "images": num_images,
        "gflops": round(size.training_flops(num_images) / 1e9, 3),
        "seconds": round(loop.seconds / len(job), 1),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "networks_together": len(job),
    }


def describe_training(network: Network, recipe: Recipe, images: Images) -> dict:
    """Provenance of a network that is known before it is trained."""
    classes = recipe.classes or "all" if recipe.turned else ", ".join(images.class_names)
    scattered = " (scattered)" if recipe.augmentation == "scatter" else ""
    return {
        "source": "trained by training/pretrain_members.py",
        "objective": "which quarter turn, without labels" if recipe.turned else "supervised classification",
        "pretraining_data": f"{without_folders(recipe.dataset)}, classes {classes}{scattered}",
        "seed": network.seed,
        "recipe": recipe.identity | {"dataset": without_folders(recipe.dataset)},
    }


def job_identity(job: list[Network], recipe: Recipe, images: Images) -> dict:
    """Identity of a job, which does not depend on the recipe's other ensembles."""
    fields = {key: value for key, value in recipe.identity.items() if key not in OTHER_ENSEMBLES}
    return fields | {"networks": [dataclasses.asdict(network) for network in job], "data": images.identity}


def check_buildable(network: Network, recipe: Recipe) -> None:
    """Raise ValueError if timm cannot create a network, or the network cannot take an image."""
    try:
        with torch.device("meta"):
            model = timm.create_model(recipe.architecture, num_classes=2, **network.model_args)
            model(torch.zeros(2, *recipe.input_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"architecture={recipe.architecture} with model_args={network.model_args} must be a network for images of "
            f"input_size={recipe.input_size}; timm says: {first_line(error)}."
        ) from error


def print_costs(recipe: Recipe, images: Images, processes: int, cpu: bool) -> None:
    """Print the cost of each ensemble, estimated from a few steps of each kind of network."""
    ensembles, speeds = [], {}
    recipe = dataclasses.replace(
        recipe, checkpoint_every=MEASURED_STEPS, evaluate_every=0, save_best=False, log_with=None, log_every=0
    )
    for name, networks in plan_ensembles(recipe).items():
        kind = json.dumps(networks[0].model_args)
        if kind not in speeds:
            speeds[kind] = measure_speed(networks[0], recipe, images, cpu)
        steps = sum(network.steps for network in networks)
        count = sum(network.snapshots for network in networks)
        size = measure_size(networks[0], recipe, images)
        num_images = steps * images.images_per_step
        hours, flops = steps * speeds[kind] / 3600, size.training_flops(num_images)
        ensembles.append(PlannedEnsemble(name, count, steps, num_images, flops, count * size.parameters, hours))
    print_plan(ensembles, processes, create_accelerator(recipe, cpu).device)


def measure_speed(network: Network, recipe: Recipe, images: Images, cpu: bool) -> float:
    """Seconds of a training step."""
    short = dataclasses.replace(network, steps=MEASURED_STEPS, snapshots=1)
    loop = create_loop([short], recipe, images, folder=Path(recipe.output) / "checkpoints" / "none", cpu=cpu)
    objective = Objective(recipe, len(images.class_names))
    steps = loop.run(partial(images.batches, [short.seed]), objective, stops=range(1, short.steps))
    return seconds_per_step(steps)


def assemble_all(recipe: Recipe, output: Path) -> None:
    """Assemble each ensemble, unless it exists with the same weights: then it may have a head by now."""
    for name, networks in plan_ensembles(recipe).items():
        folders = [output / folder for network in networks for folder in network.folders]
        ensemble = assemble(folders)
        if read_hashes(output / name) != members_sha256(ensemble.config):
            ensemble.save_pretrained(output / name)
        figures = output / LOGS / f"{name}.png", output / name / TRAINING_FIGURE
        draw_curves([log_file(recipe, network) for network in networks], *figures)
        out.print(f"{output / name}: {len(folders)} network{'s' if len(folders) > 1 else ''}", soft_wrap=True)


def read_hashes(folder: Path) -> list[str] | None:
    """The sha256 of each member's weights in an ensemble's folder, None without one."""
    if not (folder / "config.json").is_file():
        return None
    return members_sha256(ConcatEnsembleConfig.from_pretrained(folder))


def run(
    recipe: Recipe,
    *,
    parallelism: str = "data",
    cpu: bool = False,
    max_images: int | None = None,
    only_plan: bool = False,
) -> None:
    """Train all networks of a recipe that are not finished, and assemble them."""
    output, jobs = Path(recipe.output), plan_jobs(recipe)
    if output.is_file():
        raise ValueError(f"output={recipe.output} is a file; name a folder.")
    for networks in plan_ensembles(recipe).values():
        check_buildable(networks[0], recipe)
    team = Team(parallelism, 1 if only_plan else len(jobs), cpu)
    if team.is_main_process:
        out.print(f"{team}, parallelism={parallelism}", soft_wrap=True)
    images = Images(recipe, Pixels.from_settings(recipe), team.shard, max_images, with_test=False)
    if only_plan:
        print_costs(recipe, images, team.num_processes, cpu)
        return
    for number in team.jobs():
        job = jobs[number]
        folders = [output / folder for network in job for folder in network.folders]
        identity = job_identity(job, recipe, images)
        finished = [matches_identity(folder, identity) for folder in folders]  # raises for any folder of another run
        if not all(finished):
            train(job, recipe, images, cpu=cpu)
        elif team.rank == 0:
            for folder in folders:
                out.print(f"{folder} is finished, skipped", soft_wrap=True)
    team.wait_for_all()
    if team.is_main_process:
        assemble_all(recipe, output)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_on_error():
        flags = {"parallelism": PARALLELISM, "plan": {"action": "store_true", "help": "print the costs, and stop"}}
        recipe, options = read_options(Recipe, __doc__, arguments, **flags)
        machine = {"parallelism": options.parallelism, "cpu": options.cpu}
        run(recipe, max_images=options.max_images, only_plan=options.plan, **machine)


if __name__ == "__main__":
    main()
