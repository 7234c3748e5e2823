"""Distil several networks into one backbone, so that what a concatenation knows costs one network to run.

    accelerate launch training/distill.py training/recipes/scattered_digits_distill.yaml --teachers "[runs/scattered_digits/members/cat4-0, ...]"

The teachers are frozen; no label is used. `target: features`: behind the student's pooled features one linear layer predicts all teachers'
standardised features (least squares). `target: predictions`: one linear layer for each teacher predicts its classes (cross-entropy with its
softened output), which wants teachers that still have their heads. Either way the layers are thrown away, and `output` is the student as an
ensemble of one member (B's DISTILLn).
"""

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from concat_ensemble import assemble
from concat_ensemble.members.checkpoints import weights_sha256
from concat_ensemble.training.images import Images
from concat_ensemble.training.ledger import Size
from concat_ensemble.training.loop import Loop, create_accelerator, matches_identity
from concat_ensemble.training.pretraining import COMMAND, SMOKE_IMAGES, data_of, in_few_steps, pixels_of, save
from concat_ensemble.training.recipe import Settings, read_options

STATISTICS_BATCHES = 20  # of the teachers' features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Settings):
    """How networks are distilled into one."""

    teachers: list[str]  # folders in timm's layout, or timm names; an ensemble's folder gives features alone
    architecture: str  # of the student: one of timm.list_models()
    input_size: list[int]  # C, H, W that student and teachers are fed
    steps: int
    model_args: dict = dataclasses.field(default_factory=dict)
    mean: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    std: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    target: str = "features"
    temperature: float = 2.0  # of the predictions

    def __post_init__(self):
        super().__post_init__()
        self._want("steps", self.steps >= 1, "at least 1")
        self._want("teachers", bool(self.teachers), "at least one folder or timm name")
        self._want("temperature", self.temperature > 0, "above zero")
        self._one_of("target", ("features", "predictions"))


class Student(nn.Module):
    """A backbone under a linear layer that says what the teachers would."""

    def __init__(self, backbone: nn.Module, width: int, told: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, told)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixels))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


class Teachers(nn.Module):
    """What the student is to say: the teachers' features, standardised, or their classes' logits, side by side."""

    def __init__(self, settings: Distillation):
        super().__init__()
        self.predicts = settings.target == "predictions"
        if self.predicts:
            self.networks = nn.ModuleList(map(_with_head, settings.teachers))
            self.hashes = [weights_sha256(network.state_dict()) for network in self.networks]
        else:
            ensemble = assemble(settings.teachers)
            self.networks = nn.ModuleList(ensemble.members.values())
            self.hashes = [member["provenance"]["weights_sha256"] for member in ensemble.config.members]
        self.requires_grad_(False).eval()
        self.mean, self.scale = 0.0, 1.0

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, D) of each teacher."""
        return [network(pixels) for network in self.networks]

    def standardise(self, pixels) -> None:
        """Learn the features' mean and scale from some images."""
        features = torch.cat([torch.cat(self(batch), 1) for batch in pixels])
        self.mean, self.scale = features.mean(0), features.std(0).clamp_min(1e-6)

    def loss(self, said: torch.Tensor, pixels: torch.Tensor, temperature: float) -> torch.Tensor:
        told = self(pixels)
        if not self.predicts:
            return nn.functional.mse_loss(said, (torch.cat(told, 1) - self.mean) / self.scale)
        parts = said.split([logits.shape[1] for logits in told], dim=1)
        soft = [
            nn.functional.cross_entropy(p / temperature, (t / temperature).softmax(1))
            for p, t in zip(parts, told, strict=True)
        ]
        return torch.stack(soft).mean()


def _with_head(source: str) -> nn.Module:
    name = f"local-dir:{source}" if Path(source).is_dir() else source
    try:
        network = timm.create_model(name, pretrained=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"teachers: {source} is no network with a head ({error}); target=features takes ensembles."
        ) from error
    if not network.num_classes:
        raise ValueError(f"teachers: {source} has no head; use target=features.")
    return network


def run(settings: Distillation, *, cpu: bool = False, few: int | None = None) -> None:
    output = Path(settings.output)
    accelerator = create_accelerator(settings, cpu)
    share = (accelerator.process_index, accelerator.num_processes)
    images = Images(settings, pixels_of(settings), share, few)
    teachers = Teachers(settings).to(accelerator.device, memory_format=torch.channels_last)
    identity = settings.identity | {"teachers": teachers.hashes, "data": data_of(images)}
    finished = output / "members" / "distilled-0"
    if matches_identity(finished, identity):
        accelerator.print(f"{finished} is finished, skipped")
        return

    def batches(first: int):
        return images.batches([settings.seed], first)

    views = [batch.views[0][0].to(accelerator.device) for batch in itertools.islice(batches(0), STATISTICS_BATCHES)]
    if settings.target == "features":
        teachers.standardise(views)
    with FlopCounterMode(display=False) as teaching:
        told = sum(part.shape[1] for part in teachers(views[0][:1]))
    set_seed(settings.seed)
    backbone = timm.create_model(settings.architecture, num_classes=0, **settings.model_args)
    width = backbone.eval()(torch.zeros(1, *settings.input_size)).shape[1]
    student = Student(backbone, width, told)
    set_seed(settings.seed, device_specific=True)
    loop = Loop(
        accelerator,
        settings,
        [student],
        steps=settings.steps,
        folder=output / "checkpoints" / "distilled",
        identity=identity,
        name="distilled",
    )
    for _ in loop.run(
        batches, lambda network, pixels, _: teachers.loss(network(pixels), pixels, settings.temperature)
    ):
        (kept,) = loop.kept()
    if accelerator.is_main_process:
        seen = settings.steps * settings.batch_size
        learning = Size.measure(settings.architecture, settings.model_args, settings.input_size, 0).spent(seen)
        provenance = {
            "source": "distilled by training/distill.py",
            "objective": f"distillation of {len(teachers.networks)} networks' {settings.target}",
            "pretraining_data": f"{settings.dataset}, classes {', '.join(images.names)}",
            "seed": settings.seed,
            "steps": settings.steps,
            "compute": {
                "images": seen,
                "gflops": round(
                    (learning + teaching.get_total_flops() * seen) / 1e9, 3
                ),  # not the teachers' own training
                "seconds": round(loop.seconds, 1),
            },
            "command": COMMAND,
        }
        save(kept.backbone, finished, settings.architecture, settings.model_args, images, provenance, identity)
        shutil.rmtree(output / "distilled", ignore_errors=True)
        assemble(finished).save_pretrained(output / "distilled")
        print(f"{output / 'distilled'}: {len(teachers.networks)} networks in one, {width:,} features")
    loop.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        settings, options = read_options(Distillation, __doc__, arguments)
        few = SMOKE_IMAGES if options.smoke else None
        if options.smoke:
            settings = in_few_steps(settings)
        run(settings, cpu=options.cpu, few=few)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
