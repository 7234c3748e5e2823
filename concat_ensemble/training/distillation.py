"""Distill several networks into one backbone, so that inference costs one network.

    accelerate launch training/distill.py training/recipes/scattered_digits_distill.yaml --teachers "[FOLDER, FOLDER]"

Without a clone, start the installed module with `accelerate launch -m concat_ensemble.training.distillation`.

The teachers are frozen, and no label is used. With `target: features`, a linear layer on the student's pooled features
predicts the standardized features of all teachers (least squares). With `target: predictions`, a linear layer for each
teacher predicts its classes (cross-entropy with its softened output); these teachers need their heads. Either way the
layers are thrown away, and `output/distilled` is the student as an ensemble of one member (the paper's DISTILLn).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from msgspec import Meta
from torch import nn

from concat_ensemble.console import out
from concat_ensemble.files import without_folders
from concat_ensemble.members.assemble import assemble
from concat_ensemble.members.checkpoints import weights_sha256
from concat_ensemble.studies.cost import count_flops
from concat_ensemble.studies.ensemble_folders import TRAINING_FIGURE, replace_ensemble
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.evaluation import evaluate
from concat_ensemble.training.images import Images
from concat_ensemble.training.launcher import local_main_process_first
from concat_ensemble.training.ledger import Size
from concat_ensemble.training.locking import lock_output
from concat_ensemble.training.logbook import LOGS, draw_curves
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.networks import check_buildable, create_network, read_initial_weights
from concat_ensemble.training.optimizers import group_by_layers
from concat_ensemble.training.options import exit_on_error, launch_command, read_options
from concat_ensemble.training.recipe import SMOKE_STEPS, NetworkSettings, PositiveFloat, PositiveInt
from concat_ensemble.training.saving import matches_identity, public_dataset, save_network

STATISTICS_BATCHES = 20  # for the mean and scale of the teachers' features
WITH_LABELS = ("turned", "label_smoothing", "bce_loss", "bce_target_thresh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(NetworkSettings):
    """How to distill networks into a student of the settings' `architecture` and `model_args`."""

    teachers: Annotated[list[str], Meta(min_length=1)]  # timm names, folders in timm's layout, or ensembles
    steps: PositiveInt
    target: Literal["features", "predictions"] = "features"
    temperature: PositiveFloat = 2.0  # of the predictions

    def __post_init__(self):
        super().__post_init__()
        self.refuse("in distillation, which learns the teachers' outputs and no labels", *WITH_LABELS)
        if self.target != "predictions":
            self.refuse("without target=predictions", "temperature")
        if self.save_best == "top1":
            raise ValueError("save_best=top1 must be loss or null: distillation uses no labels.")

    def shrink(self) -> Self:
        return dataclasses.replace(super().shrink(), steps=min(self.steps, SMOKE_STEPS))


class Student(nn.Module):
    """A backbone under a linear layer that predicts the teachers' outputs."""

    backbone: Any  # a timm model

    def __init__(self, backbone: nn.Module, num_features: int, num_outputs: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(num_features, num_outputs)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixels))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


class Teachers(nn.Module):
    """The teachers, whose outputs the student learns: standardized features, or the logits of their classes."""

    def __init__(self, settings: Distillation):
        super().__init__()
        self.predicts = settings.target == "predictions"
        if self.predicts:
            self.networks = nn.ModuleList(map(load_with_head, settings.teachers))
            self.hashes = [weights_sha256(network.state_dict()) for network in self.networks]
            self.origins = [{"source": Path(source).name} for source in settings.teachers]
        else:
            ensemble = assemble(settings.teachers)
            self.networks = nn.ModuleList(ensemble.members.values())
            self.hashes = members_sha256(ensemble.config)
            stated = [spec["provenance"] for spec in ensemble.config.members]
            self.origins = [{key: each[key] for key in ("source", "license") if key in each} for each in stated]
        self.requires_grad_(False).eval()
        self.mean, self.scale = 0.0, 1.0

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Outputs (B, D) of each teacher."""
        return [network(pixels) for network in self.networks]

    def standardize(self, batches: Iterable[torch.Tensor], accelerator: Accelerator) -> None:
        """Compute the features' mean and scale on some images, those of all processes together."""
        features = torch.cat([torch.cat(self(batch), 1) for batch in batches]).double()
        add: Any = accelerator.reduce  # over the processes
        count = add(torch.tensor(float(len(features)), device=features.device))
        mean = add(features.sum(0)) / count
        variance = add((features - mean).square().sum(0)) / (count - 1).clamp_min(1)
        self.mean, self.scale = mean.float(), variance.sqrt().float().clamp_min(1e-6)

    def loss(self, outputs: torch.Tensor, pixels: torch.Tensor, temperature: float) -> torch.Tensor:
        """Loss of the student's outputs on images."""
        return self.losses(outputs, pixels, temperature).mean()

    def losses(self, outputs: torch.Tensor, pixels: torch.Tensor, temperature: float) -> torch.Tensor:
        """(B,) losses of the student's outputs on images."""
        targets = self(pixels)
        if not self.predicts:
            targets = (torch.cat(targets, 1) - self.mean) / self.scale
            return nn.functional.mse_loss(outputs, targets, reduction="none").mean(1)
        parts = outputs.split([logits.shape[1] for logits in targets], dim=1)
        losses = []
        for part, logits in zip(parts, targets, strict=True):
            targets = (logits / temperature).softmax(1)
            losses.append(nn.functional.cross_entropy(part / temperature, targets, reduction="none"))
        return torch.stack(losses).mean(0)


def load_with_head(source: str) -> nn.Module:
    """Load a network with its head from a folder in timm's layout, or by its timm name."""
    name = f"local-dir:{source}" if Path(source).is_dir() else source
    try:
        network = timm.create_model(name, pretrained=True)
    except (KeyError, RuntimeError, ValueError) as error:
        problem = f"{source} is not a network with a head ({error})"
        raise ValueError(f"teachers: {problem}; use target=features, which takes ensembles.") from error
    if not network.num_classes:
        raise ValueError(f"teachers: {source} has no head; use target=features.")
    return network


def parameter_groups(student: Student, settings: Distillation) -> list[dict]:
    """The optimizer's parameter groups with `layer_decay`."""
    return group_by_layers([student.backbone], student.head, settings)


def create_student(settings: Distillation, images: Images, teachers: Teachers, accelerator: Accelerator) -> Student:
    """Standardize the teachers' features if they are the target, and create a student of as many outputs."""
    if settings.target == "features":
        parts = images.batches([settings.seed], device=accelerator.device)
        count = STATISTICS_BATCHES * settings.gradient_accumulation
        teachers.standardize((part.views[0][0] for part in itertools.islice(parts, count)), accelerator)
    num_outputs = sum(
        outputs.shape[1] for outputs in teachers(torch.zeros(1, *settings.input_size, device=accelerator.device))
    )
    set_seed(settings.seed)
    backbone = create_network(settings, 0, settings.model_args)
    num_features = backbone.eval()(torch.zeros(1, *settings.input_size)).shape[1]
    return Student(backbone, num_features, num_outputs)


def run(settings: Distillation, *, cpu: bool = False, max_images: int | None = None) -> None:
    """Distill the teachers and save the student, unless it is finished."""
    output = Path(settings.output)
    folder = output / "members" / "distilled-0"
    check_buildable(settings, settings.model_args)
    accelerator = create_accelerator(settings, cpu)
    shard = (accelerator.process_index, accelerator.num_processes)
    with local_main_process_first():
        images = Images(settings, Pixels.from_settings(settings), shard, max_images, with_test=False)
        teachers = Teachers(settings)
        initial = read_initial_weights(settings).identity
    teachers = teachers.to(accelerator.device).to(memory_format=torch.channels_last)
    identity = settings.identity | {"teachers": teachers.hashes, "data": images.identity} | initial
    if matches_identity(folder, identity, settings):
        if accelerator.is_main_process:
            out.print(f"{folder} is finished, skipped", soft_wrap=True)
        return
    student = create_student(settings, images, teachers, accelerator)
    set_seed(settings.seed, device_specific=True)
    checkpoints = output / "checkpoints" / "distilled"
    loop = Loop(
        accelerator,
        settings,
        [student],
        steps=settings.steps,
        folder=checkpoints,
        identity=identity,
        name="distilled",
        logs=[output / LOGS / "distilled.csv"],
        param_groups=None if settings.layer_decay is None else partial(parameter_groups, settings=settings),
    )

    def measure(network: nn.Module, pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return teachers.losses(network(pixels), pixels, settings.temperature)[:, None]

    steps = loop.run(
        partial(images.batches, [settings.seed], steps=settings.steps),
        lambda network, pixels, _: teachers.loss(network(pixels), pixels, settings.temperature),
        evaluate=lambda network: evaluate(network, images, accelerator, measure),
    )
    for _ in steps:
        (trained,) = loop.networks_to_save()
    if accelerator.is_main_process:
        provenance = describe_distillation(settings, images, teachers)
        provenance["compute"]["seconds"] = round(loop.seconds, 1)
        provenance |= loop.best.describe(0)
        save_network(
            trained.backbone,
            folder,
            architecture=settings.architecture,
            model_args=settings.model_args,
            images=images,
            provenance=provenance,
            identity=identity,
        )
        save_student(folder, output / "distilled", output / LOGS / "distilled.csv")
        num_features = trained.head.in_features
        counts = f"{len(teachers.networks)} networks in one, {num_features:,} features"
        out.print(f"{output / 'distilled'}: {counts}", soft_wrap=True)
    loop.finish()


def save_student(member: Path, path: Path, log: Path) -> None:
    """Save the ensemble of the student alone, with its training curves and its card."""
    from concat_ensemble.reporting.model_card import renew_card  # matplotlib loads after the training

    def save(folder: Path) -> None:
        assemble(member).save_pretrained(folder)
        draw_curves([log], log.with_suffix(".png"), folder / TRAINING_FIGURE)

    replace_ensemble(path, save, lambda new: renew_card(new, path))


def describe_distillation(settings: Distillation, images: Images, teachers: Teachers) -> dict:
    """Provenance of the student. Its compute includes the teachers' forward passes, but not their training."""
    num_images = settings.steps * images.images_per_step
    size = Size.measure(settings.architecture, settings.model_args, settings.input_size, 0)
    device = next(teachers.parameters()).device
    teacher_flops = count_flops(teachers, torch.zeros(1, *settings.input_size, device=device))
    flops = size.training_flops(num_images) + teacher_flops * num_images
    provenance = {
        "source": "distilled by training/distill.py",
        "objective": f"distillation of {len(teachers.networks)} networks' {settings.target}",
        "pretraining_data": f"{without_folders(settings.dataset)}, classes {', '.join(images.class_names)}",
        "dataset": public_dataset(settings),
        "teachers": [
            origin | {"weights_sha256": digest}
            for origin, digest in zip(teachers.origins, teachers.hashes, strict=True)
        ],
        "seed": settings.seed,
        "steps": settings.steps,
        "compute": {"images": num_images, "gflops": round(flops / 1e9, 3)},
        "command": launch_command(),
    }
    return read_initial_weights(settings).describe(provenance)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_on_error():
        settings, options = read_options(Distillation, __doc__, arguments)
        with lock_output(Path(settings.output)):
            run(settings, cpu=options.cpu, max_images=options.max_images)


if __name__ == "__main__":
    main()
