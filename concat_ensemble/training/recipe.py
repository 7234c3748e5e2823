"""Settings of a training run: a YAML file read into a frozen dataclass. Every field is also a command-line option.

A field that the training would not use is refused, unless it is at its default.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import timm.optim
from accelerate.tracking import get_available_trackers
from msgspec import Meta
from timm.data import auto_augment_transform, rand_augment_transform
from torch import nn

from concat_ensemble.errors import first_line, suggest
from concat_ensemble.modeling.configuration_concat_ensemble import (
    describe_unknown_architecture,
    timm_architectures,
    validate_model_args,
)
from concat_ensemble.recipe_files import check_fields, read_fields

SCHEDULE_FREE = "schedulefree_adamw"  # Defazio et al. 2024, the paper's optimizer
OPTIMIZERS = (SCHEDULE_FREE, *map(str, timm.optim.list_optimizers()))
# Fields that may differ between a run and its continuation: they say where and how fast, not what is trained.
PLACE = ("output", "num_workers", "checkpoint_every", "keep_checkpoints", "evaluate_every", "log_every", "log_with")
PLACE += ("compile", "license")
# Fields that only some trainings use.
TIMM_AUGMENTATION = ("auto_augment", "crop_scale", "flip", "color_jitter", "random_erasing")
MIXING = ("mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off")
NOT_STREAMED = (
    "classes",
    "limit",
    "test_size",
    "validation_split",
    "validation_size",
    "evaluate_every",
    "aug_repeats",
)
SMOKE_STEPS, SMOKE_BATCH = 16, 16

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
FiniteFloat = Annotated[float, Meta(gt=-1e300, lt=1e300)]
PositiveFloat = Annotated[float, Meta(gt=0, lt=1e300)]
NonNegativeFloat = Annotated[float, Meta(ge=0, lt=1e300)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelowOne = Annotated[float, Meta(ge=0, lt=1)]
SplitShare = Annotated[float, Meta(gt=0, lt=1)]
ShareAboveZero = Annotated[float, Meta(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Data, pixels and optimization: what every training has. A step is one update of the weights on `batch_size`
    images, whatever the number of processes and of accumulated parts.

    Raises:
        ValueError: naming the field, its value and what is valid.
    """

    dataset: str  # as in concat_ensemble.load_data
    dataset_config: str | None = None
    dataset_revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    validation_split: str | None = None  # to evaluate on, with evaluate_every
    classes: list[int] | None = None  # train on these classes only
    limit: PositiveInt | None = None  # maximum number of images of each split
    test_size: SplitShare | None = None  # to leave out if there is no test split; default: 0.3 to fine-tune, else none
    validation_size: SplitShare = 0.01  # share of the others to evaluate on if it has no validation split
    streaming: bool = False  # read the training split from the Hub while training; shuffled in a buffer only

    augmentation: Literal["timm", "scatter", "none"] = "timm"  # "scatter" places each image anew on a noisy canvas
    turned: bool = False  # no labels: predict the quarter turn of each scattered image (RotNet, arXiv:1803.07728)
    aug_repeats: PositiveInt = 1  # views of an image one after the other, on different processes; 1: as usual
    auto_augment: str | None = None  # timm's, such as rand-m9-mstd0.5-inc1
    crop_scale: list[Share] = field(default_factory=lambda: [0.08, 1.0])  # smallest and largest area of a random crop
    flip: Share = 0.5  # probability of a mirrored image
    color_jitter: NonNegativeFloat = 0.4  # timm has none beside auto_augment
    random_erasing: Share = 0.0

    mixup: NonNegativeFloat = 0.0  # alpha of timm's Mixup, as is cutmix; 0: none
    cutmix: NonNegativeFloat = 0.0
    mixup_prob: Share = 1.0  # probability that a part of a batch is mixed, by either of them
    mixup_switch_prob: Share = 0.5  # probability of cutmix, if there are both
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"  # what has one random draw
    mixup_off: ShareAboveZero = 1.0  # share of the steps after which no images are mixed; 1: mixed to the end
    label_smoothing: ShareBelowOne = 0.0
    bce_loss: bool = False  # binary cross-entropy of each class in place of cross-entropy
    bce_target_thresh: ShareBelowOne | None = None  # with bce_loss: soft labels above it become 1, others 0

    optimizer: str = "adamw"  # schedulefree_adamw, or one of timm.optim.list_optimizers()
    learning_rate: PositiveFloat = 2e-3  # peak
    layer_decay: ShareAboveZero | None = None  # timm's, of the learning rate from layer to layer towards the input
    weight_decay: NonNegativeFloat = 0.05
    betas: Annotated[list[ShareBelowOne], Meta(min_length=2, max_length=3)] | None = None  # default: the optimizer's
    clip_norm: PositiveFloat | None = None
    ema_decay: ShareBelowOne = 0.0  # of a moving average of the weights, which is then what is saved; 0: none

    schedule: Literal["cosine", "tanh", "wsd", "constant"] = "cosine"  # timm's, by steps; schedulefree_adamw has none
    warmup: ShareBelowOne = 0.05  # share of the steps
    warmup_lr: NonNegativeFloat | None = None  # learning rate of the first step; default: an even part of the peak
    min_lr: NonNegativeFloat = 0.0  # at the end of the schedule

    batch_size: PositiveInt = 64
    gradient_accumulation: PositiveInt = 1  # number of parts of a batch, run one after the other on each device
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # with torch.compile
    dist_bn: Literal["reduce", "broadcast"] = "reduce"  # BatchNorm's statistics: all processes' mean, or the first's
    sync_bn: bool = False  # BatchNorm over the images of all processes, on GPUs

    num_workers: NonNegativeInt = 0  # processes that read images
    checkpoint_every: PositiveInt = 1_000  # steps
    keep_checkpoints: PositiveInt = 2
    evaluate_every: NonNegativeInt = 0  # steps; 0: never, and see `learns_validation`
    save_best: Literal["top1", "loss"] | None = None  # save the weights of the best evaluation, not the last ones
    log_every: NonNegativeInt = 50  # steps between two lines of the log, and two rows of log.csv; 0: no log
    log_with: str | None = None  # one of accelerate's trackers that is installed, such as tensorboard or wandb
    seed: NonNegativeInt = 0
    license: str | None = None  # of the weights, such as mit; by default none is stated
    output: str = "runs/members"

    def __post_init__(self):
        check_fields(type(self), vars(self))
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            expected = "two shares of the image's area above 0, the smaller one first"
            raise ValueError(f"crop_scale={self.crop_scale} must be {expected}.")
        self._check_auto_augment()
        if self.save_best and not self.evaluate_every:
            raise ValueError(f"save_best={self.save_best} needs evaluate_every=N, steps between evaluations; set it.")
        self._check_data()
        self._check_mixing()
        self._check_optimizer()
        self._check_schedule()
        if self.log_with is not None and self.log_with not in (trackers := list(map(str, get_available_trackers()))):
            expected = ", ".join(trackers) or "left out, since none is"
            raise ValueError(f"log_with={self.log_with!r} must be a tracker that is installed: {expected}.")

    @property
    def learns_validation(self) -> bool:
        """Whether the validation images are trained on too, where there are test images to evaluate on."""
        return not self.evaluate_every

    def refuse(self, reason: str, *names: str) -> None:
        """Raise ValueError if one of these fields is not at its default. `reason` goes on after "must be left out"."""
        defaults = self.defaults()
        for name in names:
            value, default = getattr(self, name), defaults[name]
            if value != default:
                raise ValueError(f"{name}={value!r} must be left out {reason}; its default is {default!r}.")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each field that has one."""
        made = {each.name: each.default_factory() for each in fields(cls) if each.default_factory is not MISSING}
        return {each.name: each.default for each in fields(cls) if each.default is not MISSING} | made

    def _check_data(self) -> None:
        if self.turned and (self.augmentation != "scatter" or self.evaluate_every):
            reason = "held-out images keep their labels"
            raise ValueError(f"turned=True needs augmentation=scatter and evaluate_every=0: {reason}.")
        if self.streaming and self.augmentation == "scatter":
            raise ValueError("streaming=True needs augmentation=timm or none: scatter holds the images in memory.")
        if self.streaming:
            self.refuse("with streaming=True, which reads the training split alone, as it comes", *NOT_STREAMED)
        if self.augmentation != "timm":
            self.refuse(f"with augmentation={self.augmentation}; augmentation=timm uses it", *TIMM_AUGMENTATION)
        if self.auto_augment is not None and self.color_jitter:
            self.refuse("or 0 with auto_augment, which timm uses instead", "color_jitter")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    def _check_mixing(self) -> None:
        if not self.mixes:
            self.refuse("without mixup or cutmix", *MIXING)
        if not (self.mixup and self.cutmix):
            self.refuse("unless there are both mixup and cutmix", "mixup_switch_prob")
        if self.mixes and not self.mixup_prob:
            raise ValueError("mixup_prob=0.0 must be above 0; leave mixup and cutmix out instead.")
        if not self.bce_loss:
            self.refuse("without bce_loss=True", "bce_target_thresh")

    def _check_optimizer(self) -> None:
        """Raise ValueError for an optimizer that is unknown, or that timm cannot create with its settings."""
        if self.optimizer not in OPTIMIZERS:
            expected = f"{SCHEDULE_FREE} or one of timm.optim.list_optimizers()"
            raise ValueError(f"optimizer={self.optimizer!r} must be {expected}{suggest(self.optimizer, OPTIMIZERS)}")
        info = None if self.optimizer == SCHEDULE_FREE else timm.optim.get_optimizer_info(self.optimizer)
        count = 2 if info is None else info.num_betas * info.has_betas
        if self.betas is not None and len(self.betas) != count:
            expected = f"{count} numbers" if count else "left out"
            raise ValueError(f"betas={self.betas} must be {expected} with optimizer={self.optimizer}.")
        if info is None:
            self.refuse(f"with {SCHEDULE_FREE}, which saves its own average of the weights", "ema_decay")
            return
        try:
            timm.optim.create_optimizer_v2(nn.Linear(1, 1), self.optimizer, lr=self.learning_rate)
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
            expected = f"one that timm can create here ({first_line(error)})"
            raise ValueError(f"optimizer={self.optimizer!r} must be {expected}.") from error

    def _check_schedule(self) -> None:
        if self.optimizer == SCHEDULE_FREE:
            reason = f"with {SCHEDULE_FREE}, which has no schedule and warms up from zero"
            self.refuse(reason, "warmup_lr", "min_lr", *(["schedule"] if self.schedule != "constant" else []))
        if self.schedule == "constant":
            self.refuse("with schedule=constant, which never decays", "min_lr")
        if not self.warmup:
            self.refuse("with warmup=0", "warmup_lr")
        for name in ("min_lr", "warmup_lr"):
            if (getattr(self, name) or 0) > self.learning_rate:
                value = getattr(self, name)
                raise ValueError(f"{name}={value:g} must be at most learning_rate={self.learning_rate:g}.")

    def _check_auto_augment(self) -> None:
        if self.auto_augment is None:
            return
        create = rand_augment_transform if self.auto_augment.startswith("rand") else auto_augment_transform
        try:
            create(self.auto_augment, {})
        except (AssertionError, KeyError, ValueError) as error:
            expected = "a policy of timm, such as rand-m9-inc1, original or v0"
            raise ValueError(f"auto_augment={self.auto_augment!r} must be {expected}.") from error

    @property
    def identity(self) -> dict:
        """The fields that a run must share with the one that it continues."""
        return {key: value for key, value in asdict(self).items() if key not in PLACE}

    def shrink(self) -> Self:
        """The same settings with few steps and small batches, for `--smoke`."""
        return replace(self, batch_size=min(self.batch_size, SMOKE_BATCH))

    @classmethod
    def from_file(cls, path: Path, **changes) -> Self:
        """Read a recipe; `changes` replace its values.

        Raises:
            ValueError: naming the field that is unknown, missing or not valid.
        """
        fields = read_fields(cls, path, **changes)
        if fields.get("mixed_precision") is False:
            fields["mixed_precision"] = "no"  # YAML reads no as false
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """The training of networks that are created here."""

    architecture: str  # one of timm.list_models()
    model_args: dict = field(default_factory=dict)
    pretrained: bool = False  # start from timm's pretrained weights of this name, each network with a new head
    initial_checkpoint: str | None = None  # start from other weights: a folder or a checkpoint that build takes
    input_size: list[PositiveInt]  # C, H, W in training and in use
    mean: list[FiniteFloat] = field(default_factory=lambda: [0.5])  # one per channel, or one for all channels
    std: list[PositiveFloat] = field(default_factory=lambda: [0.5])

    def __post_init__(self):
        super().__post_init__()
        if self.architecture.split(".")[0] not in timm_architectures():
            raise ValueError(f"architecture: {describe_unknown_architecture(self.architecture)}")
        validate_model_args(self.model_args)
        if self.pretrained:
            self.refuse("with pretrained=True, which is another source of weights", "initial_checkpoint")
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3):
            raise ValueError(f"input_size={self.input_size} must be [C, H, W] with 1 or 3 channels.")
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name}={values} must be one value, or one for each of the {channels} channels.")
        if not self.evaluate_every:
            self.refuse("without evaluate_every", "validation_split", "validation_size")

    @property
    def initial_source(self) -> str | None:
        """Where the weights come from that the training starts with, None for random ones."""
        return self.architecture if self.pretrained else self.initial_checkpoint


@dataclass(frozen=True, kw_only=True)
class Recipe(NetworkSettings):
    """K networks trained separately for `total_steps` / K steps each, for every K in `members`, and the networks to
    compare them with.
    """

    total_steps: PositiveInt  # of each ensemble, shared by its members
    members: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4])
    baseline_extra: NonNegativeFloat = 0.125  # share of additional steps for CAT1, as in the paper
    wide_model_args: dict = field(default_factory=dict)  # replace some of model_args in the single wide network, W2
    wide_steps: NonNegativeInt = 0  # steps of W2, 0: no W2; a quarter is equal compute where the widths are doubled
    snapshots: NonNegativeInt = 0  # members from one run of total_steps with as many learning-rate cycles; 4: CAT4-S
    seeds: list[NonNegativeInt] | None = None  # of one ensemble's members; default: seed * 1,000 + a number
    members_per_process: PositiveInt = 1  # networks trained in one pass over the images, each decoded once for all

    def __post_init__(self):
        super().__post_init__()
        steps = self.total_steps
        if max(self.members, default=0) > steps or not (self.members or self.snapshots):
            raise ValueError(f"members={self.members} must be numbers of networks from 1 to total_steps={steps}.")
        if self.snapshots and not 2 <= self.snapshots <= steps:
            raise ValueError(f"snapshots={self.snapshots} must be 0, or from 2 to total_steps={steps}.")
        if self.snapshots and self.save_best:
            raise ValueError(f"snapshots={self.snapshots} needs save_best=null: each snapshot ends a cycle.")
        if self.snapshots and (self.schedule != "cosine" or self.optimizer == SCHEDULE_FREE):
            optimizer = f"an optimizer with a schedule, which {SCHEDULE_FREE} does not have"
            raise ValueError(f"snapshots={self.snapshots} needs schedule=cosine and {optimizer}.")
        validate_model_args(self.wide_model_args)
        if self.wide_steps:
            self.refuse("with wide_steps, because W2 is of another width", "pretrained", "initial_checkpoint")
        if 1 not in self.members and self.baseline_extra:
            self.refuse("or 0 unless there is 1 in members", "baseline_extra")
        if self.seeds is not None:
            has_others = len(self.members) != 1 or self.wide_steps or self.snapshots
            if has_others or len(self.seeds) != self.members[0]:
                planned = f"members={self.members}, wide_steps={self.wide_steps}, snapshots={self.snapshots}"
                raise ValueError(f"seeds={self.seeds} needs a single ensemble with as many members, not {planned}.")

    def shrink(self) -> Self:
        steps = max(min(self.total_steps, SMOKE_STEPS), *self.members, self.snapshots)
        return replace(super().shrink(), total_steps=steps, wide_steps=min(self.wide_steps, 4), num_workers=0)
