"""Train the members of time-concatenated ensembles and what they are compared with, then assemble them.

    accelerate launch training/pretrain_members.py training/recipes/scattered_digits_timecat.yaml

writes `members/NAME-K` (timm's own layout) for each network and `cat1`, `cat2`, ..., `w2`, `cat4-s` (ensembles that
`AutoModel.from_pretrained` loads). The same command goes on where it was stopped; a network that is finished is not
trained again. `--plan` says what it would cost, and stops.

Over several processes, `--parallelism data` trains each network on all of them, and `--parallelism members` as many
networks at a time as there are processes, which then exchange nothing.
"""

import dataclasses
import hashlib
import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import save_for_hf
from torch import nn

from concat_ensemble import assemble
from concat_ensemble.errors import first_line
from concat_ensemble.training.images import Images, Pixels
from concat_ensemble.training.ledger import MEASURED, WARM_UP, Line, Size, print_plan, seconds_per_step
from concat_ensemble.training.loop import TOLD, Loop, create_accelerator, matches_identity
from concat_ensemble.training.recipe import Recipe, read_options
from concat_ensemble.training.teams import PARALLELISMS, Team, processes_asked_for


def launch_command() -> str:
    """How this process was started, for provenance: the script, or the module of an installed package."""
    program, *arguments = sys.argv
    path = Path(program)
    module = ["-m", f"concat_ensemble.training.{path.stem}"] if path.parent == Path(__file__).parent else [program]
    return shlex.join(["accelerate", "launch", *module, *arguments])


COMMAND = launch_command()
SMOKE_STEPS, SMOKE_IMAGES, SMOKE_BATCH = 16, 200, 16
SEEDS = 1_000  # that a run may use


@dataclass(frozen=True)
class Network:
    """One training: a member of the ensemble `name`, or with `snapshots` all of its members."""

    name: str
    number: int
    steps: int
    seed: int
    model_args: dict
    snapshots: int = 1

    @property
    def folders(self) -> list[str]:
        """Of the members that come out of it."""
        return [f"members/{self.name}-{self.number + k}" for k in range(self.snapshots)]


def plan_networks(recipe: Recipe) -> list[Network]:
    """Every network that the recipe asks for, each with a seed of its own."""
    networks, first = [], recipe.seed * SEEDS
    for count in sorted(recipe.members):
        steps = recipe.total_steps // count if count > 1 else round(recipe.total_steps * (1 + recipe.baseline_extra))
        # Its own, whichever other ensembles are trained beside it.
        seeds = recipe.seeds or [first + count * (count - 1) // 2 + k for k in range(count)]
        networks += [Network(f"cat{count}", k, steps, seed, recipe.model_args) for k, seed in enumerate(seeds)]
    if recipe.wide_steps:
        networks.append(
            Network("w2", 0, recipe.wide_steps, first + SEEDS - 1, recipe.model_args | recipe.wide_model_args)
        )
    if recipe.snapshots:
        name = f"cat{recipe.snapshots}-s"
        networks.append(Network(name, 0, recipe.total_steps, first + SEEDS - 2, recipe.model_args, recipe.snapshots))
    return networks


def plan_jobs(recipe: Recipe) -> list[list[Network]]:
    """Networks that are trained in one pass over the images."""
    groups = itertools.groupby(plan_networks(recipe), key=lambda network: network.name)
    together = recipe.members_per_process
    return [
        networks[start : start + together]
        for networks in (list(group) for _, group in groups)
        for start in range(0, len(networks), together)
    ]


def pixels_of(recipe: Recipe) -> Pixels:
    channels = recipe.input_size[0]
    mean, std = (tuple(values * (channels // len(values))) for values in (recipe.mean, recipe.std))
    return Pixels(tuple(recipe.input_size), mean, std)


class Objective:
    """Cross-entropy with the recipe's label smoothing, mixup and cutmix, all timm's."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes
            )
        self.loss = SoftTargetCrossEntropy() if self.mix else LabelSmoothingCrossEntropy(recipe.label_smoothing)

    def __call__(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.mix:
            images, labels = self.mix(images, labels)
        return self.loss(network(images), labels)


def create_loop(job: list[Network], recipe: Recipe, images: Images, accelerator: Accelerator, folder: Path) -> Loop:
    """A job's networks as they are at the beginning, or as a checkpoint has them."""
    made = []
    for network in job:
        set_seed(network.seed)
        made.append(timm.create_model(recipe.architecture, num_classes=len(images.names), **network.model_args))
    set_seed(job[0].seed, device_specific=True)
    return Loop(
        accelerator,
        recipe,
        made,
        steps=job[0].steps,
        folder=folder,
        identity=job_identity(job, recipe, images),
        name=f"{job[0].name}-{job[0].number}" + (f" to {job[-1].number}" if len(job) > 1 else ""),
        cycles=job[0].snapshots,
    )


def train(job: list[Network], recipe: Recipe, images: Images, output: Path, cpu: bool) -> None:
    """Train a job's networks and save them, each written aside and renamed."""
    accelerator = create_accelerator(recipe, cpu)
    loop = create_loop(job, recipe, images, accelerator, output / "checkpoints" / f"{job[0].name}-{job[0].number}")
    seeds = [network.seed for network in job]
    steps = loop.run(
        lambda first: images.batches(seeds, first),
        Objective(recipe, len(images.names)),
        stops=loop.cycle_ends,
        evaluate=lambda network: top1(network, images, accelerator),
    )
    for step in steps:
        kept, cut = loop.kept(), loop.cycle_ends.index(step)
        if not accelerator.is_main_process:
            continue
        cost = step - (loop.cycle_ends[cut - 1] if cut else 0)
        for network, model in zip(job, kept, strict=True):
            size = Size.measure(recipe.architecture, network.model_args, recipe.input_size, len(images.names))
            seen = cost * recipe.batch_size
            spent = {
                "images": seen,
                "gflops": round(size.spent(seen) / 1e9, 3),
                "seconds": round(loop.seconds / len(job), 1),
                "device": str(accelerator.device.type),
                "processes": accelerator.num_processes,
                "networks_together": len(job),
            }
            provenance = describe_provenance(network, recipe, images) | {
                "steps": cost,
                "compute": spent,
                "command": COMMAND,
            }
            save(
                model,
                output / network.folders[cut],
                recipe.architecture,
                network.model_args,
                images,
                provenance,
                loop.identity,
            )
    loop.finish()


@torch.no_grad()
def top1(network: nn.Module, images: Images, accelerator: Accelerator) -> float:
    """Share of the held-out images that are recognised; each process looks at its part."""
    right = []
    for (view,), labels in accelerator.prepare_data_loader(images.held_out(images.settings.batch_size)):
        found = network(view).argmax(1) == labels
        right.append(accelerator.gather_for_metrics(found))
    return torch.cat(right).float().mean().item()


def save(
    model: nn.Module,
    folder: Path,
    architecture: str,
    model_args: dict,
    images: Images,
    provenance: dict,
    identity: dict,
) -> None:
    """A network in timm's own layout, with a head or without, written aside and renamed."""
    pixels = {**dataclasses.asdict(images.pixels), "crop_mode": "center"}
    config = {
        "pretrained_cfg": {**pixels, "license": "apache-2.0"},
        "provenance": provenance,
        "label_names": images.names,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = timm.create_model(architecture, num_classes=model.num_classes, **model_args)
    plain.load_state_dict(weights, assign=True)
    save_for_hf(plain, aside, model_config=config, model_args=model_args, safe_serialization=True, data_config=pixels)
    (aside / TOLD).write_text(json.dumps({"identity": identity}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def data_of(images: Images) -> dict:
    """What tells one training set from another: its classes and every image's label."""
    if images.settings.streaming:
        return {"classes": images.names, "streamed": True}
    digest = hashlib.sha256(images.train_labels.numpy().tobytes()).hexdigest()[:16]
    return {"classes": images.names, "images": images.size, "labels_sha256": digest}


def describe_provenance(network: Network, recipe: Recipe, images: Images) -> dict:
    classes = recipe.classes or "all" if recipe.turned else ", ".join(images.names)
    return {
        "source": "trained by training/pretrain_members.py",
        "objective": "which quarter turn, without labels" if recipe.turned else "supervised classification",
        "pretraining_data": f"{recipe.dataset}, classes {classes}"
        + (" (scattered)" if recipe.augmentation == "scatter" else ""),
        "seed": network.seed,
        "recipe": recipe.identity,
    }


def job_identity(job: list[Network], recipe: Recipe, images: Images) -> dict:
    """What must be the same for a training to be this one, whichever others the recipe has besides."""
    others = ("members", "wide_steps", "wide_model_args", "snapshots")
    kept = {key: value for key, value in recipe.identity.items() if key not in others}
    return kept | {"networks": [dataclasses.asdict(network) for network in job], "data": data_of(images)}


def check_buildable(network: Network, recipe: Recipe) -> None:
    """Raise ValueError, before anything is written, where timm cannot build a network or it cannot take an image."""
    try:
        with torch.device("meta"):
            timm.create_model(recipe.architecture, num_classes=2, **network.model_args)(
                torch.zeros(2, *recipe.input_size)
            )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{recipe.architecture} with {network.model_args} and images of {recipe.input_size}: {first_line(error)}."
        ) from error


def holds(folder: Path, ensemble) -> bool:
    """Whether the folder holds an ensemble of the same weights already."""
    if not (folder / "config.json").is_file():
        return False
    there = json.loads((folder / "config.json").read_text())["members"]
    return [m["provenance"]["weights_sha256"] for m in there] == [
        m["provenance"]["weights_sha256"] for m in ensemble.config.members
    ]


def plan(recipe: Recipe, images: Images, processes: int, cpu: bool) -> None:
    """Print what everything will cost, from a few steps of each kind of network."""
    lines, speeds = [], {}
    for name, group in itertools.groupby(plan_networks(recipe), key=lambda network: network.name):
        networks = list(group)
        kind = json.dumps(networks[0].model_args)
        if kind not in speeds:
            short = dataclasses.replace(networks[0], steps=WARM_UP + MEASURED, snapshots=1)
            recipe = dataclasses.replace(recipe, checkpoint_every=short.steps, evaluate_every=0, log_with=None)
            accelerator = create_accelerator(recipe, cpu)
            loop = create_loop([short], recipe, images, accelerator, Path(recipe.output) / "checkpoints" / "none")
            steps = loop.run(
                lambda first, s=short: images.batches([s.seed], first),
                Objective(recipe, len(images.names)),
                stops=range(1, short.steps),
            )
            speeds[kind] = seconds_per_step(steps)
        size = Size.measure(recipe.architecture, networks[0].model_args, recipe.input_size, len(images.names))
        steps = sum(network.steps for network in networks)
        seen, kept = steps * recipe.batch_size, sum(network.snapshots for network in networks)
        lines.append(
            Line(name, kept, steps, seen, size.spent(seen), kept * size.parameters, steps * speeds[kind] / 3600)
        )
    print_plan(lines, processes, accelerator.device)


def assemble_all(recipe: Recipe, output: Path) -> None:
    for name, group in itertools.groupby(plan_networks(recipe), key=lambda network: network.name):
        folders = [output / folder for network in group for folder in network.folders]
        ensemble = assemble(folders)
        if not holds(output / name, ensemble):  # else it may have a head by now, which is to stay
            ensemble.save_pretrained(output / name)
        print(f"{output / name}: {len(folders)} network{'s' if len(folders) > 1 else ''}")


def run(
    recipe: Recipe, *, parallelism: str = "data", cpu: bool = False, smoke: bool = False, only_plan: bool = False
) -> None:
    output = Path(recipe.output)
    if output.is_file():
        raise ValueError(f"output={recipe.output} is a file; name a folder.")
    jobs = plan_jobs(recipe)
    for job in {job[0].name: job for job in jobs}.values():
        check_buildable(job[0], recipe)
    team = Team(parallelism, 1 if only_plan else len(jobs), cpu)
    if team.leads_all:
        asked = processes_asked_for()
        print(f"{team}, parallelism={parallelism}", flush=True)
        if asked not in (None, team.world):
            print(
                f"warning: accelerate was asked for {asked} processes and started {team.world}. On the CPU give it --multi_gpu and this script "
                "--cpu: accelerate's own --cpu starts one.",
                file=sys.stderr,
            )
    share = (team.ranks.index(team.rank), len(team.ranks))
    images = Images(recipe, pixels_of(recipe), share, few=SMOKE_IMAGES if smoke else None)
    if only_plan:
        plan(recipe, images, team.world, cpu)
        return
    for number in team.jobs():
        job = jobs[number]
        folders = [output / folder for network in job for folder in network.folders]
        identity = job_identity(job, recipe, images)
        found = [matches_identity(folder, identity) for folder in folders]  # none may be another's
        if all(found):
            if share[0] == 0:
                print(*(f"{folder} is finished, skipped" for folder in folders), sep="\n", flush=True)
            continue
        train(job, recipe, images, output, cpu)
    team.wait_for_all()
    if team.leads_all:
        assemble_all(recipe, output)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        recipe, options = read_options(
            Recipe,
            __doc__,
            arguments,
            parallelism={
                "choices": PARALLELISMS,
                "default": "data",
                "help": "what several processes share: each network's images, or the networks",
            },
            plan={"action": "store_true", "help": "print what it will cost, and stop"},
        )
        if options.smoke:
            recipe = smoked(recipe)
        run(recipe, parallelism=options.parallelism, cpu=options.cpu, smoke=options.smoke, only_plan=options.plan)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def in_few_steps(settings):
    """What has `steps` of its own, fine-tuning or distillation, for a look at whether it runs."""
    return dataclasses.replace(
        settings, steps=min(settings.steps, SMOKE_STEPS), batch_size=min(settings.batch_size, SMOKE_BATCH)
    )


def smoked(recipe: Recipe) -> Recipe:
    """The same path in a few steps."""
    steps = max(SMOKE_STEPS, *recipe.members, recipe.snapshots)
    return dataclasses.replace(
        recipe,
        total_steps=steps,
        wide_steps=min(recipe.wide_steps, 4),
        batch_size=min(recipe.batch_size, SMOKE_BATCH),
        num_workers=0,
    )


if __name__ == "__main__":
    main()
