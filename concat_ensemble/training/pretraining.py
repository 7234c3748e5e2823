"""Train the members of time-concatenated ensembles and the networks they are compared with, then assemble them.

    accelerate launch training/pretrain_members.py training/recipes/scattered_digits_timecat.yaml

writes `members/NAME-K` (timm's own layout) for each network and `cat1`, `cat2`, ..., `w2`, `cat4-s` (ensembles that
`AutoModel.from_pretrained` loads). The same command continues a run that was stopped and skips finished networks.
`--plan` prints what the run would cost, and stops; `--plan --devices 1 4 8 --memory 80` plans for other machines.
Without a clone, start the installed module:

    accelerate launch -m concat_ensemble.training.pretraining RECIPE.yaml

With several processes, `--parallelism data` trains each network on all of them; `--parallelism members` trains as many
networks at a time as there are processes, which exchange nothing; `--parallelism auto` does what is finished first.
Several processes on the CPU need `accelerate launch --multi_gpu --num_processes N` with this script's own `--cpu`,
because accelerate's `--cpu` starts one process.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from concat_ensemble.console import out
from concat_ensemble.files import without_folders
from concat_ensemble.members.assemble import assemble
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.studies.ensemble_folders import TRAINING_FIGURE
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.evaluation import evaluate
from concat_ensemble.training.forecast import Devices, choose_sharing, print_forecast
from concat_ensemble.training.images import Images
from concat_ensemble.training.launcher import local_main_process_first
from concat_ensemble.training.ledger import GIB, Size
from concat_ensemble.training.locking import lock_output
from concat_ensemble.training.logbook import LOGS, draw_curves
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.memory import memory_of_device
from concat_ensemble.training.networks import check_buildable, create_network, read_initial_weights
from concat_ensemble.training.objective import Objective
from concat_ensemble.training.options import PARALLELISM, exit_on_error, launch_command, read_options
from concat_ensemble.training.planning import Network, network_size, plan_ensembles, plan_jobs
from concat_ensemble.training.recipe import Recipe
from concat_ensemble.training.saving import matches_identity, public_dataset, save_network
from concat_ensemble.training.sharing import share_networks
from concat_ensemble.training.teams import Team, count_processes

PLAN_OPTIONS: dict[str, dict[str, Any]] = {
    "plan": {"action": "store_true", "help": "print hours and memory for each parallelism, and stop"},
    "devices": {"type": int, "nargs": "+", "metavar": "N", "help": "plan for these numbers of devices"},
    "memory": {"type": float, "metavar": "GIB", "help": "plan for devices with this much memory"},
    "teraflops": {
        "type": float,
        "metavar": "SPEED",
        "help": "plan for devices of this speed",
    },
    "efficiency": {
        "type": float,
        "default": 1.0,
        "help": "of several devices that train one network, for auto: 1 if two are twice as fast as one (default)",
    },
}
OTHER_ENSEMBLES = ("members", "wide_steps", "wide_model_args", "snapshots")  # fields that other networks depend on


def create_loop(job: list[Network], recipe: Recipe, images: Images, *, folder: Path, cpu: bool) -> Loop:
    """Create a job's networks, each from its own seed, and the loop that trains them."""
    accelerator, networks, num_classes = create_accelerator(recipe, cpu), [], len(images.class_names)
    for network in job:
        set_seed(network.seed)
        networks.append(create_network(recipe, num_classes, network.model_args))
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
    seeds, size = [network.seed for network in job], network_size(recipe, job[0], len(images.class_names))
    steps = loop.run(
        partial(images.batches, seeds, steps=loop.steps),
        Objective(recipe),
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
    provenance = {
        "source": "trained by training/pretrain_members.py",
        "objective": "which quarter turn, without labels" if recipe.turned else "supervised classification",
        "pretraining_data": f"{without_folders(recipe.dataset)}, classes {classes}{scattered}",
        "seed": network.seed,
        "recipe": recipe.identity | {"dataset": public_dataset(recipe)},
    } | ({"weights": "EMA"} if recipe.ema_decay else {})
    return read_initial_weights(recipe).describe(provenance)


def job_identity(job: list[Network], recipe: Recipe, images: Images) -> dict:
    """Identity of a job, which does not depend on the recipe's other ensembles."""
    fields = {key: value for key, value in recipe.identity.items() if key not in OTHER_ENSEMBLES}
    fields |= read_initial_weights(recipe).identity
    return fields | {"networks": [dataclasses.asdict(network) for network in job], "data": images.identity}


def check_networks(recipe: Recipe) -> None:
    """Raise ValueError if a network of the recipe cannot be created."""
    for networks in plan_ensembles(recipe).values():
        check_buildable(recipe, networks[0].model_args)


def assemble_all(recipe: Recipe, output: Path) -> None:
    """Assemble each ensemble, unless it exists with the same weights: then it may have a head by now."""
    for name, networks in plan_ensembles(recipe).items():
        folders = [output / folder for network in networks for folder in network.folders]
        ensemble = assemble(folders)
        is_new = read_hashes(output / name) != members_sha256(ensemble.config)
        if is_new:
            ensemble.save_pretrained(output / name)
        figures = output / LOGS / f"{name}.png", output / name / TRAINING_FIGURE
        if is_new or not all(figure.exists() for figure in figures):
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
    efficiency: float = 1.0,
    cpu: bool = False,
    max_images: int | None = None,
) -> None:
    """Train all networks of a recipe that are not finished, and assemble them."""
    output, jobs = Path(recipe.output), plan_jobs(recipe)
    if output.is_file():
        raise ValueError(f"output={recipe.output} is a file; name a folder.")
    check_networks(recipe)
    with local_main_process_first():
        images = Images(recipe, Pixels.from_settings(recipe), max_images=max_images, with_test=False)
        read_initial_weights(recipe)
    memory = None if recipe.compile else memory_of_device(cpu)
    team = Team(choose_sharing(recipe, parallelism, Devices(count_processes(), memory, efficiency)), cpu)
    if team.is_main_process:
        out.print(f"{team}, parallelism={parallelism}", soft_wrap=True)

    def train_job(number: int) -> None:
        job, images.shard = jobs[number], team.shard
        folders = [output / folder for network in job for folder in network.folders]
        identity = job_identity(job, recipe, images)
        # Raises for any folder of another run.
        finished = [matches_identity(folder, identity, recipe) for folder in folders]
        if not all(finished):
            train(job, recipe, images, cpu=cpu)
        elif team.rank == 0:
            for folder in folders:
                out.print(f"{folder} is finished, skipped", soft_wrap=True)

    team.run(train_job)
    if team.is_main_process:
        assemble_all(recipe, output)


def check_plan_options(options: argparse.Namespace) -> None:
    """Raise ValueError for a value that is not positive, and for options of a plan without `--plan`."""
    for name in ("devices", "memory", "teraflops", "efficiency"):
        value = getattr(options, name)
        if value is None:
            continue
        if not options.plan and name != "efficiency":
            raise ValueError(f"{name}={value} describes a plan; add --plan.")
        if not all(0 < each < float("inf") for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name}={value} must be above 0.")


def plan(recipe: Recipe, options: argparse.Namespace) -> None:
    """Print what a recipe costs. Of several processes, the first one does."""
    check_networks(recipe)
    count = count_processes()
    memory = memory_of_device(options.cpu) if options.memory is None else options.memory * GIB
    devices = [Devices(number, memory, options.efficiency) for number in options.devices or [count]]

    def print_once(number: int) -> None:
        if number == 0:
            machine = {"teraflops": options.teraflops, "cpu": options.cpu}
            print_forecast(recipe, devices, max_images=options.max_images, **machine)

    each_alone = share_networks("members", [1.0] * count, count, batch_size=1)[0]
    Team(each_alone, options.cpu).run(print_once)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_on_error():
        recipe, options = read_options(Recipe, __doc__, arguments, parallelism=PARALLELISM, **PLAN_OPTIONS)
        check_plan_options(options)
        if options.plan:
            plan(recipe, options)
            return
        with lock_output(Path(recipe.output)):
            run(
                recipe,
                parallelism=options.parallelism,
                efficiency=options.efficiency,
                cpu=options.cpu,
                max_images=options.max_images,
            )


if __name__ == "__main__":
    main()
