"""Settings of a training run: a YAML file read into a frozen dataclass. Every field is also a command-line option."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import timm.optim
from msgspec import Meta
from timm.data import auto_augment_transform, rand_augment_transform

from concat_ensemble.errors import suggest
from concat_ensemble.recipe_files import check_fields, read_fields

SCHEDULE_FREE = "schedulefree_adamw"  # Defazio et al. 2024, the paper's optimizer
OPTIMIZERS = (SCHEDULE_FREE, *map(str, timm.optim.list_optimizers()))
# Fields that may differ between a run and its continuation: they say where and how fast, not what is trained.
PLACE = ("output", "num_workers", "checkpoint_every", "keep_checkpoints", "evaluate_every", "log_every", "log_with")
PLACE += ("compile",)
SMOKE_STEPS, SMOKE_BATCH = 16, 16

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
FiniteFloat = Annotated[float, Meta(gt=-1e300, lt=1e300)]
PositiveFloat = Annotated[float, Meta(gt=0, lt=1e300)]
NonNegativeFloat = Annotated[float, Meta(ge=0, lt=1e300)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelowOne = Annotated[float, Meta(ge=0, lt=1)]
SplitShare = Annotated[float, Meta(gt=0, lt=1)]


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
    classes: list[int] | None = None  # train on these classes only
    limit: PositiveInt | None = None  # maximum number of images of each split
    test_size: SplitShare = 0.3  # share of the images to hold out if the dataset has no test split
    validation_size: SplitShare = 0.01  # share of the remaining images to evaluate on, with evaluate_every
    streaming: bool = False  # read the training split from the Hub while training; shuffled in a buffer only

    augmentation: Literal["timm", "scatter", "none"] = "timm"  # "scatter" places each image anew on a noisy canvas
    turned: bool = False  # no labels: predict the quarter turn of each scattered image (RotNet, arXiv:1803.07728)
    auto_augment: str | None = None  # timm's, such as rand-m9-mstd0.5-inc1
    crop_scale: list[Share] = field(default_factory=lambda: [0.08, 1.0])  # smallest and largest area of a random crop
    flip: Share = 0.5  # probability of a mirrored image
    color_jitter: NonNegativeFloat = 0.4
    random_erasing: Share = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    label_smoothing: ShareBelowOne = 0.0

    optimizer: str = "adamw"  # schedulefree_adamw, or one of timm.optim.list_optimizers()
    learning_rate: PositiveFloat = 2e-3  # peak
    weight_decay: NonNegativeFloat = 0.05
    betas: Annotated[list[ShareBelowOne], Meta(min_length=2, max_length=2)] | None = None  # default: the optimizer's
    schedule: Literal["cosine", "tanh", "wsd", "constant"] = "cosine"  # timm's, by steps; schedulefree_adamw has none
    warmup: ShareBelowOne = 0.05  # share of the steps
    batch_size: PositiveInt = 64
    gradient_accumulation: PositiveInt = 1  # number of parts of a batch, run one after the other on each device
    clip_norm: PositiveFloat | None = None
    ema_decay: ShareBelowOne = 0.0  # of a moving average of the weights, which is then what is saved; 0: none
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # with torch.compile

    num_workers: NonNegativeInt = 0  # processes that read images
    checkpoint_every: PositiveInt = 1_000  # steps
    keep_checkpoints: PositiveInt = 2
    evaluate_every: NonNegativeInt = 0  # steps; 0: never, and the validation images are training images too
    save_best: Literal["top1", "loss"] | None = None  # save the weights of the best evaluation, not the last ones
    log_every: NonNegativeInt = 50  # steps between two lines of the log, and two rows of log.csv; 0: no log
    log_with: str | None = None  # one of accelerate's trackers, such as tensorboard or wandb
    seed: NonNegativeInt = 0
    output: str = "runs/members"

    def __post_init__(self):
        check_fields(type(self), vars(self))
        if self.optimizer not in OPTIMIZERS:
            expected = f"{SCHEDULE_FREE} or one of timm.optim.list_optimizers()"
            raise ValueError(f"optimizer={self.optimizer!r} must be {expected}{suggest(self.optimizer, OPTIMIZERS)}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            expected = "two shares of the image's area above 0, the smaller one first"
            raise ValueError(f"crop_scale={self.crop_scale} must be {expected}.")
        self._check_auto_augment()
        if self.save_best and not self.evaluate_every:
            raise ValueError(f"save_best={self.save_best} needs evaluate_every=N, steps between evaluations; set it.")
        if self.turned and (self.augmentation != "scatter" or self.evaluate_every):
            reason = "held-out images keep their labels"
            raise ValueError(f"turned=True needs augmentation=scatter and evaluate_every=0: {reason}.")
        if self.streaming and self.augmentation == "scatter":
            raise ValueError("streaming=True needs augmentation=timm or none: scatter holds the images in memory.")

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
    input_size: list[PositiveInt]  # C, H, W in training and in use
    model_args: dict = field(default_factory=dict)
    mean: list[FiniteFloat] = field(default_factory=lambda: [0.5])  # one per channel, or one for all channels
    std: list[PositiveFloat] = field(default_factory=lambda: [0.5])

    def __post_init__(self):
        super().__post_init__()
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3):
            raise ValueError(f"input_size={self.input_size} must be [C, H, W] with 1 or 3 channels.")
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name}={values} must be one value, or one for each of the {channels} channels.")


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
        if self.seeds is not None:
            has_others = len(self.members) != 1 or self.wide_steps or self.snapshots
            if has_others or len(self.seeds) != self.members[0]:
                planned = f"members={self.members}, wide_steps={self.wide_steps}, snapshots={self.snapshots}"
                raise ValueError(f"seeds={self.seeds} needs a single ensemble with as many members, not {planned}.")

    def shrink(self) -> Self:
        steps = max(SMOKE_STEPS, *self.members, self.snapshots)
        return replace(super().shrink(), total_steps=steps, wide_steps=min(self.wide_steps, 4), num_workers=0)
