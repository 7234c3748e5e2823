"""Fine-tune an ensemble on a dataset, whole or in two stages.

    accelerate launch training/finetune.py training/recipes/scattered_digits_finetune.yaml --model runs/scattered_digits/members/cat4

`stages: two` (the paper's best): each member learns the target on its own, then they are concatenated again, and `output` is an
ensemble to probe. `stages: one`: all members at once, under a head; `output` is then a classifier. Either way training begins with
the head that a linear probe finds, the test split is looked at once, at the end, and `output/results` has what came out for every
classifier that was trained.
"""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import param_groups_layer_decay
from torch import nn

from concat_ensemble import LinearProbe, assemble, extract_features
from concat_ensemble.members.checkpoints import weights_sha256
from concat_ensemble.probes.intervals import bootstrap_intervals
from concat_ensemble.probes.metrics import ProbeMetrics
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.studies.probing import with_head
from concat_ensemble.studies.provenance import members_sha256, training_cost, versions
from concat_ensemble.studies.results import RESULTS, Results, Row, Run, pack_bits
from concat_ensemble.training.images import Images, Pixels
from concat_ensemble.training.ledger import Size
from concat_ensemble.training.loop import TOLD, Loop, create_accelerator, matches_identity
from concat_ensemble.training.recipe import Settings, read_options
from concat_ensemble.training.teams import PARALLELISMS, Team
from pretrain_members import COMMAND, SMOKE_IMAGES, data_of, in_few_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(Settings):
    """How an ensemble is fine-tuned."""

    model: str  # what concat-ensemble build takes; an ensemble's folder
    steps: int  # of the whole ensemble, or of each member
    stages: str = "two"
    head: str = "probe"  # that of a linear probe, or "zero"
    layer_decay: float | None = 0.75  # of the learning rate, from layer to layer down; timm's

    def __post_init__(self):
        super().__post_init__()
        self._want("steps", self.steps >= 1, "at least 1")
        self._one_of("stages", ("one", "two"))
        self._one_of("head", ("probe", "zero"))
        self._want(
            "layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "above 0 and at most 1, or null"
        )
        if self.streaming:
            raise ValueError(
                "streaming=True: fine-tuning begins with a linear probe, which reads the images more than once."
            )


def pixels_of(model: nn.Module) -> Pixels:
    """What the ensemble takes, which must be the same for all its members."""
    config = model.config
    if len(config.geometries) > 1:
        raise ValueError(
            "the members take images of different sizes or crops; fine-tune with stages=two, or build with --preprocessing shared."
        )
    source = config.geometries[0]
    return Pixels(
        tuple(source["input_size"]),
        tuple(source["mean"]),
        tuple(source["std"]),
        source["interpolation"],
        source["crop_pct"],
    )


def parameter_groups(settings: FineTuning):
    """Of a classifier: timm's layers of each member, and the head."""

    def groups(model: nn.Module) -> list[dict]:
        if settings.layer_decay is None:
            return [
                {"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": settings.weight_decay}
            ]
        decay = {"weight_decay": settings.weight_decay, "layer_decay": settings.layer_decay}
        found = [group for member in model.members.values() for group in param_groups_layer_decay(member, **decay)]
        return [*found, {"params": list(model.classifier.parameters()), "weight_decay": 0.0}]

    return groups


def create_classifier(model: nn.Module, images: Images, settings: FineTuning) -> nn.Module:
    """The ensemble with a head to begin from."""
    table = extract_features(model, images.data, quiet=True)
    validation = (
        None if settings.evaluate_every else table["validation"]
    )  # else the head would have seen what it is watched on
    probe = LinearProbe(seed=settings.seed).fit(table["train"], validation=validation)
    classifier = with_head(model, probe, images.names)
    if settings.head == "zero":
        nn.init.zeros_(classifier.classifier.weight)
        nn.init.zeros_(classifier.classifier.bias)
    return classifier


def fine_tune(
    model: nn.Module, name: str, settings: FineTuning, share: tuple[int, int], few: int | None, cpu: bool
) -> None:
    """One classifier from an ensemble, saved to `output/NAME` with its results."""
    folder = Path(settings.output) / name
    images = Images(settings, pixels_of(model), share, few)
    accelerator = create_accelerator(settings, cpu)
    identity = settings.identity | {
        "name": name,
        "members_sha256": members_sha256(model.config),
        "data": data_of(images),
    }
    if matches_identity(folder, identity):
        accelerator.print(f"{folder} is finished, skipped")
        return
    set_seed(settings.seed)
    classifier = create_classifier(copy.deepcopy(model), images, settings)
    set_seed(settings.seed, device_specific=True)
    loop = Loop(
        accelerator,
        settings,
        [classifier],
        steps=settings.steps,
        folder=Path(settings.output) / "checkpoints" / name,
        identity=identity,
        name=name,
        param_groups=parameter_groups(settings),
    )
    loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    for _ in loop.run(
        lambda first: images.batches([settings.seed], first),
        lambda network, pixels, labels: loss(network(pixel_values=pixels).logits, labels),
        evaluate=lambda network: float(
            (
                predict_logits(network, images, "validation", accelerator).argmax(1) == images.labels("validation")
            ).mean()
        ),
    ):
        (tuned,) = loop.kept()
    scores = predict_logits(tuned, images, "test", accelerator)
    if accelerator.is_main_process:
        save(tuned, folder, scores, images, settings, identity, loop.seconds)
    loop.finish()


@torch.no_grad()
def predict_logits(network: nn.Module, images: Images, split: str, accelerator: Accelerator) -> np.ndarray:
    """(N, classes) logits of a split's images; each process sees its part."""
    network.eval()
    found = []
    for (pixels,), _ in accelerator.prepare_data_loader(images.held_out(images.settings.batch_size, split)):
        found.append(accelerator.gather_for_metrics(network(pixel_values=pixels).logits.float()))
    return torch.cat(found).cpu().numpy()


def save(
    model: nn.Module,
    folder: Path,
    scores: np.ndarray,
    images: Images,
    settings: FineTuning,
    identity: dict,
    seconds: float,
) -> None:
    """The classifier, its results and its card, written aside and renamed."""
    seen = settings.steps * settings.batch_size
    for k, member in model.members.items():
        spec = model.config.members[int(k)]
        provenance, size = (
            spec["provenance"],
            Size.measure(spec["architecture"], spec["model_args"], images.pixels.input_size, 0),
        )
        provenance["weights_sha256"] = weights_sha256(member.state_dict())
        provenance["fine_tuned"] = {"dataset": settings.dataset, "steps": settings.steps, "command": COMMAND}
        # What it cost before, where that is known, and now.
        if "steps" in provenance:
            provenance["steps"] += settings.steps
        if "compute" in provenance:
            provenance["compute"]["images"] += seen
            provenance["compute"]["gflops"] += round(size.spent(seen) / 1e9, 3)
    steps, gflops = training_cost(model)
    labels = images.labels("test")
    run = Run(
        seed=settings.seed,
        metrics=ProbeMetrics().compute(predictions=scores, references=labels),
        l2_strength=settings.weight_decay,
        n_train=images.size,
        n_test=len(labels),
        intervals={
            key: list(bounds) for key, bounds in bootstrap_intervals(scores.argmax(1), labels, settings.seed).items()
        },
        correct=pack_bits(scores.argmax(1) == labels),
    )
    row = Row(
        folder.name,
        "ensemble",
        model.config.num_features,
        len(model.members),
        steps,
        gflops,
        [run],
    )
    how = {"kind": "fine-tuning"} | {
        k: v for k, v in settings.identity.items() if k not in ("model", "seed", "dataset")
    }
    results = Results(
        folder.name,
        {"name": settings.dataset, "classes": settings.classes, "seed": settings.seed, "test_images": len(labels)},
        how,
        [row],
        members_sha256(model.config),
        COMMAND,
        versions(),
        {"training": seconds},
    )
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.float().save_pretrained(aside)
    results.save(aside / RESULTS / "fine-tuned.json")
    (aside / TOLD).write_text(json.dumps({"identity": identity}, indent=1) + "\n")
    write_card(aside, title=folder.name)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    print(
        f"{folder}: top-1 {100 * run.metrics['top1']:.1f} on {len(labels):,} test images, {settings.steps:,} steps",
        flush=True,
    )


def run(settings: FineTuning, *, parallelism: str = "data", cpu: bool = False, few: int | None = None) -> None:
    output = Path(settings.output)
    model = assemble(settings.model)
    parts = {"whole": model}
    if settings.stages == "two":
        parts = {f"member-{k}": model.export_active([k]) for k in model.config.built_members}
    else:
        pixels_of(model)
    team = Team(parallelism, len(parts), cpu)
    share = (team.ranks.index(team.rank), len(team.ranks))
    for number in team.jobs():
        name = list(parts)[number]
        fine_tune(parts[name], name, settings, share, few, cpu)
    team.wait_for_all()
    if team.leads_all and settings.stages == "two":
        together = assemble([output / name for name in parts])
        together.save_pretrained(output / "two-stage")
        print(
            f"{output / 'two-stage'}: {len(parts)} members; probe it with concat-ensemble probe {output / 'two-stage'} --dataset ..."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        settings, options = read_options(
            FineTuning,
            __doc__,
            arguments,
            parallelism={
                "choices": PARALLELISMS,
                "default": "data",
                "help": "what several processes share: each training's images, or the members",
            },
        )
        few = SMOKE_IMAGES if options.smoke else None
        if options.smoke:
            settings = in_few_steps(settings)
        run(settings, parallelism=options.parallelism, cpu=options.cpu, few=few)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
