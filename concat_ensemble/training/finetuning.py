"""Fine-tune an ensemble on a dataset, each member alone or all members at once.

    accelerate launch training/finetune.py training/recipes/scattered_digits_finetune.yaml --model FOLDER

Without a clone, start the installed module with `accelerate launch -m concat_ensemble.training.finetuning`.

With `stages: two` (best in the paper), each member learns the target alone, without the validation images, and
`output/two-stage` is an ensemble of the tuned members to probe, on splits of the same seed. With `stages: one`, all
members learn at once under a head, and `output/whole` is a classifier. Either way, training starts from the head of a
linear probe, the test split is used once, at the end, and each classifier has its results in `results`.
"""

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
from accelerate.utils import set_seed
from torch import nn

from concat_ensemble.console import out
from concat_ensemble.data.naming import METRICS
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.files import without_folders
from concat_ensemble.members.assemble import assemble
from concat_ensemble.members.checkpoints import weights_sha256
from concat_ensemble.members.provenance import read_provenances
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification as Classifier
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel
from concat_ensemble.probes.intervals import central_interval, resampled_metrics
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.metrics import ProbeMetrics
from concat_ensemble.studies.ensemble_folders import TRAINING_FIGURE
from concat_ensemble.studies.probing import with_head
from concat_ensemble.studies.provenance import members_sha256, training_cost, versions
from concat_ensemble.studies.results import RESULTS, Results, Row, Run, pack_bits
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.evaluation import evaluate, predict_logits
from concat_ensemble.training.images import Images
from concat_ensemble.training.launcher import local_main_process_first
from concat_ensemble.training.ledger import Size
from concat_ensemble.training.locking import lock_output
from concat_ensemble.training.logbook import LOGS, draw_curves
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.objective import Objective
from concat_ensemble.training.optimizers import group_by_layers
from concat_ensemble.training.options import PARALLELISM, exit_on_error, launch_command, read_options
from concat_ensemble.training.recipe import SMOKE_STEPS, PositiveInt, Settings, ShareAboveZero
from concat_ensemble.training.saving import matches_identity, public_dataset, replace_result
from concat_ensemble.training.sharing import finish_first, share_networks
from concat_ensemble.training.teams import Team, count_processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(Settings):
    """How to fine-tune an ensemble."""

    model: str  # an ensemble's folder, or another source that concat-ensemble build takes
    steps: PositiveInt  # of the whole ensemble, or of each member
    stages: Literal["one", "two"] = "two"
    head: Literal["probe", "zero"] = "probe"  # initial head: that of a linear probe, or zeros
    layer_decay: ShareAboveZero | None = 0.75
    test_split: str | None = None  # such as validation, where the labels of a split named test are hidden

    def __post_init__(self):
        super().__post_init__()
        if self.streaming:
            reason = "fine-tuning starts from a linear probe, which reads images repeatedly"
            raise ValueError(f"streaming=True must be false: {reason}.")
        self.refuse("in fine-tuning, which learns the labels", "turned")

    @property
    def learns_validation(self) -> bool:
        """In two stages the validation images are left for the probe of the tuned members: on images that these have
        learned, nearly any L2 strength would do."""
        return super().learns_validation and self.stages == "one"

    def shrink(self) -> Self:
        return dataclasses.replace(super().shrink(), steps=min(self.steps, SMOKE_STEPS))


def read_pixels(config: ConcatEnsembleConfig) -> Pixels:
    """The input of an ensemble, which must be the same for all its members."""
    if len(config.geometries) > 1:
        remedy = "fine-tune with stages=two, or build with --preprocessing shared"
        raise ValueError(f"stages=one needs members with images of the same size and crop; {remedy}.")
    source = config.geometries[0]
    if "channels" in source:
        remedy = "use transformers' Trainer with the ensemble's own image processor"
        raise ValueError(
            f"a member sees channels {source['channels']}; fine-tuning takes gray or RGB images: {remedy}."
        )
    size, mean, std = (tuple(source[key]) for key in ("input_size", "mean", "std"))
    return Pixels(size, mean, std, source["interpolation"], source["crop_pct"])


def parameter_groups(model: Classifier, settings: FineTuning) -> list[dict]:
    """The optimizer's parameter groups of a classifier: timm's groups by layers for each member, and the head."""
    weight_decay = settings.weight_decay
    if settings.layer_decay is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    return group_by_layers(model.members.values(), model.classifier, settings)


def create_classifier(model: ConcatEnsemblePreTrainedModel, images: Images, settings: FineTuning) -> Classifier:
    """The ensemble with its initial head."""
    table = extract_features(model, images.data, quiet=True)
    # Where the validation images are held out of the training, the initial head must not have seen them either.
    validation = table["validation"] if settings.learns_validation else None
    probe = LinearProbe(seed=settings.seed).fit(table["train"], validation=validation)
    classifier = with_head(model, probe, images.class_names)
    if settings.head == "zero":
        nn.init.zeros_(classifier.classifier.weight)
        nn.init.zeros_(classifier.classifier.bias)
    return classifier


def fine_tune(
    model: ConcatEnsemblePreTrainedModel,
    folder: Path,
    settings: FineTuning,
    *,
    images: Images,
    cpu: bool = False,
) -> None:
    """Train one classifier from an ensemble and save it with its results to `folder`, unless it is finished."""
    accelerator = create_accelerator(settings, cpu)
    sources = {"name": folder.name, "members_sha256": members_sha256(model.config), "data": images.identity}
    identity = settings.identity | sources
    if matches_identity(folder, identity, settings):
        if accelerator.is_main_process:
            out.print(f"{folder} is finished, skipped", soft_wrap=True)
        return
    set_seed(settings.seed)
    classifier = create_classifier(copy.deepcopy(model), images, settings)
    set_seed(settings.seed, device_specific=True)
    loop = Loop(
        accelerator,
        settings,
        [classifier],
        steps=settings.steps,
        folder=folder.parent / "checkpoints" / folder.name,
        identity=identity,
        name=folder.name,
        logs=[folder.parent / LOGS / f"{folder.name}.csv"],
        param_groups=partial(parameter_groups, settings=settings),
    )
    steps = loop.run(
        partial(images.batches, [settings.seed], steps=settings.steps),
        Objective(settings),
        evaluate=lambda network: evaluate(network, images, accelerator),
    )
    for _ in steps:
        (tuned,) = loop.networks_to_save()
    logits = predict_logits(tuned, images, "test", accelerator)
    if accelerator.is_main_process:
        tuned.float()
        results = {"identity": identity, "seconds": loop.seconds, "selected": loop.best.describe(0)}
        save_classifier(tuned, folder, logits, settings, images=images, **results)
    loop.finish()


def save_classifier(
    model: Classifier,
    folder: Path,
    logits: np.ndarray,
    settings: FineTuning,
    *,
    images: Images,
    identity: dict,
    seconds: float,
    selected: dict | None = None,
) -> None:
    """Save a classifier with its results on the test images, from their (N, classes) logits, and its card. The result
    replaces `folder` as a whole; the model does not change.
    """
    from concat_ensemble.reporting.model_card import write_card  # matplotlib loads after the training

    saved = copy.copy(model)  # the same weights under another config
    saved.config = describe_fine_tuning(model, settings, images, selected)
    results = describe_results(saved, folder.name, logits, images=images, seconds=seconds)
    with replace_result(folder, identity) as aside:
        saved.save_pretrained(aside)
        results.save(aside / RESULTS / "fine-tuned.json")
        log = folder.parent / LOGS / f"{folder.name}.csv"
        draw_curves([log], log.with_suffix(".png"), aside / TRAINING_FIGURE)
        write_card(aside, title=folder.name)
    top1 = 100 * results.rows[0].mean
    counts = f"top-1 {top1:.1f} on {len(logits):,} test images, {settings.steps:,} steps"
    out.print(f"{folder}: {counts}", soft_wrap=True)


def describe_fine_tuning(
    model: Classifier, settings: FineTuning, images: Images, selected: dict | None = None
) -> ConcatEnsembleConfig:
    """The config of a fine-tuned ensemble: its members' provenance names the fine-tuning and counts both trainings."""
    config, num_images = copy.deepcopy(model.config), settings.steps * images.images_per_step
    for (k, member), stated in zip(model.members.items(), read_provenances(config), strict=True):
        spec = config.members[int(k)]
        provenance = spec["provenance"]
        provenance["weights_sha256"] = weights_sha256(member.state_dict())
        # What is made of weights is under their licence, too; the settings' own is for those that state none.
        provenance |= {"license": settings.license} if settings.license and not stated.license else {}
        provenance.pop("weights", None)
        provenance |= {"weights": "EMA"} if settings.ema_decay else {}
        dataset = public_dataset(settings)
        provenance["fine_tuned"] = {"dataset": dataset, "steps": settings.steps, "command": launch_command()}
        provenance["fine_tuned"] |= selected or {}
        if stated.steps is not None:  # else the cost of pretraining is not known
            provenance["steps"] = stated.steps + settings.steps
        if stated.compute and stated.compute.gflops is not None:
            size = Size.measure(spec["architecture"], spec["model_args"], images.pixels.input_size, 0)
            gflops = stated.compute.gflops + round(size.training_flops(num_images) / 1e9, 3)
            provenance["compute"] |= {"images": stated.compute.images + num_images, "gflops": gflops}
    return config


def describe_results(model: Classifier, name: str, logits: np.ndarray, *, images: Images, seconds: float) -> Results:
    """Results of a classifier on the test images."""
    settings, labels = images.settings, images.labels("test")
    predictions = logits.argmax(1)
    metrics = ProbeMetrics().compute(predictions=logits, references=labels) or {}
    resampled = resampled_metrics(
        logits, labels, metrics=[name for name in METRICS if name in metrics], seed=settings.seed
    )
    run = Run(
        seed=settings.seed,
        metrics=metrics,
        l2_strength=settings.weight_decay,
        n_train=images.size,
        n_test=len(labels),
        intervals={name: list(central_interval(values, metrics[name])) for name, values in resampled.items()},
        correct=pack_bits(predictions == labels),
    )
    row = Row(name, "ensemble", model.config.num_features, len(model.members), *training_cost(model), [run])
    recorded_elsewhere = ("model", "seed", "dataset")
    dataset = without_folders(settings.dataset)
    return Results(
        name,
        {"name": dataset, "classes": settings.classes, "seed": settings.seed, "test_images": len(labels)},
        {"kind": "fine-tuning"} | {k: v for k, v in settings.identity.items() if k not in recorded_elsewhere},
        [row],
        members_sha256(model.config),
        launch_command(),
        versions(),
        {"training": seconds},
    )


def run(settings: FineTuning, *, parallelism: str = "data", cpu: bool = False, max_images: int | None = None) -> None:
    """Fine-tune the whole ensemble, or each member and then assemble them."""
    output = Path(settings.output)
    with local_main_process_first():
        model = assemble(settings.model)
        parts = {"whole": model}
        if settings.stages == "two":
            parts = {f"member-{k}": model.export_active([k]) for k in model.config.built_members}
        pixels = {name: read_pixels(part.config) for name, part in parts.items()}
        split = settings.test_split
        images = {
            each: Images(settings, each, max_images=max_images, test_split=split)
            for each in dict.fromkeys(pixels.values())
        }
    batch = {"batch_size": settings.batch_size, "accumulation": settings.gradient_accumulation}
    names, costs = list(parts), [1.0] * len(parts)
    plans = share_networks(parallelism, costs, count_processes(), **batch)
    team = Team(finish_first(plans, costs), cpu)

    def tune(number: int) -> None:
        name = names[number]
        images[pixels[name]].shard = team.shard
        fine_tune(parts[name], output / name, settings, images=images[pixels[name]], cpu=cpu)

    team.run(tune)
    if team.is_main_process and settings.stages == "two":
        folder = output / "two-stage"
        assemble([output / name for name in names]).save_pretrained(folder)
        draw_curves([output / LOGS / f"{name}.csv" for name in names], folder / TRAINING_FIGURE)
        advice = f"probe it with concat-ensemble probe {folder} --dataset ..."
        out.print(f"{folder}: {len(names)} members; {advice}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_on_error():
        settings, options = read_options(FineTuning, __doc__, arguments, parallelism=PARALLELISM)
        with lock_output(Path(settings.output)):
            run(settings, parallelism=options.parallelism, cpu=options.cpu, max_images=options.max_images)


if __name__ == "__main__":
    main()
