"""What a training run is: a YAML file read into a frozen dataclass, every field also a command-line option."""

import argparse
import dataclasses
import difflib
import typing
from pathlib import Path

import timm.optim
import timm.scheduler
import yaml
from timm.data import auto_augment_transform, rand_augment_transform

from concat_ensemble.files import read_yaml
from concat_ensemble.records import fits, spelled

AUGMENTATIONS = ("timm", "scatter", "none")
SCHEDULES = ("cosine", "tanh", "wsd", "constant")  # of timm's: a warmup, then as each says
SCHEDULE_FREE = "schedulefree_adamw"  # Defazio et al. 2024, the paper's
# What may differ between a run and its continuation: where things go and how fast, not what comes out.
PLACE = ("output", "num_workers", "checkpoint_every", "keep_checkpoints", "evaluate_every", "log_with", "compile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Data, pixels and optimisation: what every script here has. A step is one update of the weights, on `batch_size`
    images whatever the number of processes and of accumulated parts.
    """

    dataset: str  # as concat_ensemble.load_data names it
    dataset_config: str | None = None
    dataset_revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    classes: list[int] | None = None  # train on these alone
    limit: int | None = None  # images of each split at most
    test_size: float = 0.3  # share held out where the dataset has no test split
    validation_size: float = 0.01  # share of what is left that training is watched on, with evaluate_every
    streaming: bool = False  # read the training split from the Hub while training; then in order, shuffled in a buffer

    augmentation: str = "timm"  # its training transform; "scatter": each image placed anew on a noisy canvas; "none"
    turned: bool = (
        False  # no labels: which quarter turn was each scattered image given? (Gidaris 2018, arXiv:1803.07728)
    )
    auto_augment: str | None = None  # timm's, as rand-m9-mstd0.5-inc1
    crop_scale: list[float] = dataclasses.field(default_factory=lambda: [0.08, 1.0])  # area of the random crop
    flip: float = 0.5  # how often an image is mirrored
    color_jitter: float = 0.4
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    optimizer: str = "adamw"  # one of timm.optim.list_optimizers(), or schedulefree_adamw
    learning_rate: float = 2e-3  # peak
    weight_decay: float = 0.05
    betas: list[float] | None = None  # of Adam's kin; the optimizer's own when left out
    schedule: str = "cosine"  # timm's, by steps; schedulefree_adamw has none
    warmup: float = 0.05  # share of the steps
    batch_size: int = 64
    gradient_accumulation: int = 1  # parts of a batch, one after the other on a device
    clip_norm: float | None = None
    ema_decay: float = 0.0  # of the weights' moving average, which is what is kept; 0: none
    mixed_precision: str = "no"  # fp16 or bf16
    gradient_checkpointing: bool = False
    compile: bool = False  # the networks, by torch.compile

    num_workers: int = 0  # processes that read images
    checkpoint_every: int = 1_000  # steps; what a kill loses at most
    keep_checkpoints: int = 2
    evaluate_every: int = 0  # steps; 0: never, and the validation images are trained on, too
    log_with: str | None = None  # a tracker of accelerate's, as tensorboard or wandb
    seed: int = 0
    output: str = "runs/members"

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation", "checkpoint_every", "keep_checkpoints"):
            self._want(name, getattr(self, name) >= 1, "at least 1")
        for name in ("weight_decay", "evaluate_every", "num_workers", "color_jitter", "mixup", "cutmix"):
            self._want(name, getattr(self, name) >= 0, "not below zero")
        self._want("learning_rate", self.learning_rate > 0, "above zero")
        self._want("limit", self.limit is None or self.limit > 0, "at least 1")
        self._want(
            "betas",
            self.betas is None or (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)),
            "two shares below 1",
        )
        self._want("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above zero")
        for name in ("test_size", "validation_size"):
            self._want(name, 0 < getattr(self, name) < 1, "a share between 0 and 1")
        for name in ("warmup", "ema_decay", "label_smoothing"):
            self._want(name, 0 <= getattr(self, name) < 1, "from 0 up to, not including, 1")
        for name in ("flip", "random_erasing"):
            self._want(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        self._one_of("augmentation", AUGMENTATIONS)
        self._one_of("mixed_precision", ("no", "fp16", "bf16"))
        self._one_of("schedule", SCHEDULES)
        self._one_of("optimizer", (SCHEDULE_FREE, *timm.optim.list_optimizers()))
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        self._want("crop_scale", 0 < low <= high <= 1, "two shares of the image's area, the smaller first")
        if self.auto_augment is not None:
            make = rand_augment_transform if self.auto_augment.startswith("rand") else auto_augment_transform
            try:
                make(self.auto_augment, {})
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(
                    f"auto_augment={self.auto_augment!r} is none of timm's, such as rand-m9-mstd0.5-inc1, original or v0."
                ) from error
        if self.turned and (self.augmentation != "scatter" or self.evaluate_every):
            raise ValueError(
                "turned=True goes with augmentation=scatter and evaluate_every=0: held-out images keep their labels."
            )
        if self.streaming and self.augmentation == "scatter":
            raise ValueError("streaming=True goes with augmentation=timm or none: scatter holds the images in memory.")

    def _want(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)} must be {what}.")

    def _one_of(self, name: str, known: typing.Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=3)
            raise ValueError(
                f"{name}={value!r} must be {'like ' if near else 'one of '}{', '.join(near or known[:12])}."
            )

    @property
    def identity(self) -> dict:
        """What a continued run must have in common with the one it continues."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in PLACE}

    @classmethod
    def from_file(cls, path: Path, **changes) -> typing.Self:
        """Read a recipe; `changes` win over what it says.

        Raises:
            ValueError: naming the file and the field, when it is unknown, missing, or of another type.
        """
        given = read_yaml(path)
        if not isinstance(given, dict):
            raise ValueError(f"{path} must hold fields, as in 'dataset: digits'; it holds {type(given).__name__}.")
        hints = typing.get_type_hints(cls)
        for name, value in (given := given | changes).items():
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, n=1)
                raise ValueError(
                    f"{path}: no field {name!r}; "
                    + (f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}.")
                )
            if value is False and hints[name] is str:
                value = given[name] = "no"  # which YAML takes for false
            if not fits(value, hints[name]):
                hint = " (YAML takes 1e-3 for text: write 0.001 or 1.0e-3)" if "float" in str(hints[name]) else ""
                raise ValueError(f"{path}: {name}={value!r} must be {spelled(hints[name])}{hint}.")
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in given
        ]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}.")
        return cls(**given)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """One option per field; values are YAML, as in the file: `--members "[1, 4]"`."""
        for field in dataclasses.fields(cls):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                dest=field.name,
                type=_yaml_value,
                metavar="VALUE",
                default=argparse.SUPPRESS,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """K members trained apart for `total_steps` / K steps each, for every K in `members`, and what they are compared
    with.
    """

    architecture: str  # of each member: one of timm.list_models()
    input_size: list[int]  # C, H, W that members are trained at and will be fed
    total_steps: int  # spent by each ensemble in all
    model_args: dict = dataclasses.field(default_factory=dict)
    mean: list[float] = dataclasses.field(default_factory=lambda: [0.5])  # one per channel, or one for all
    std: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    members: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4])
    baseline_extra: float = 0.125  # CAT1 gets this share of steps more, as in the paper
    wide_model_args: dict = dataclasses.field(
        default_factory=dict
    )  # changes that make the single wide network, W2; none: no W2
    wide_steps: int = 0  # its steps; at equal FLOPs a quarter where widths are doubled
    snapshots: int = 0  # members out of one run of total_steps with as many cycles of the learning rate: CAT4-S for 4
    seeds: list[int] | None = None  # of a single ensemble's members; else network n of the run has seed * 100 + n
    members_per_process: int = 1  # trained in one pass over the images, each decode_image once for all

    def __post_init__(self):
        super().__post_init__()
        for name in ("total_steps", "members_per_process"):
            self._want(name, getattr(self, name) >= 1, "at least 1")
        for name in ("baseline_extra", "wide_steps"):
            self._want(name, getattr(self, name) >= 0, "not below zero")
        numbers = self.members and min(self.members) > 0 and max(self.members) <= self.total_steps
        self._want(
            "members",
            numbers or (not self.members and self.snapshots),
            f"numbers of networks from 1 to total_steps={self.total_steps}",
        )
        self._want(
            "snapshots",
            self.snapshots == 0 or 2 <= self.snapshots <= self.total_steps,
            f"0, or from 2 to total_steps={self.total_steps}",
        )
        if self.snapshots and (self.schedule != "cosine" or self.optimizer == SCHEDULE_FREE):
            raise ValueError(
                f"snapshots={self.snapshots} come from cycles of schedule=cosine, which optimizer=schedulefree_adamw has not."
            )
        size = self.input_size
        self._want(
            "input_size", len(size) == 3 and size[0] in (1, 3) and min(size) >= 1, "[C, H, W] with 1 or 3 channels"
        )
        for name in ("mean", "std"):
            self._want(
                name, len(getattr(self, name)) in (1, size[0]), f"one value, or one for each of {size[0]} channels"
            )
        if self.seeds is not None and (
            len(self.members) != 1 or self.wide_steps or self.snapshots or len(self.seeds) != self.members[0]
        ):
            raise ValueError(
                f"seeds={self.seeds} are those of one ensemble alone, one for each of its members={self.members}."
            )


def read_options(
    kind: type[Settings], doc: str, arguments: list[str] | None, **flags: dict
) -> tuple[Settings, argparse.Namespace]:
    """The settings of a script from its command line, `SCRIPT RECIPE.yaml --FIELD VALUE`, and its own flags."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe_file", type=Path, help="a YAML file of training/recipes")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps on a handful of images, to see that everything runs"
    )
    for name, settings in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    kind.add_options(parser)
    found = parser.parse_args(arguments)
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind.from_file(found.recipe_file, **{k: v for k, v in vars(found).items() if k in fields}), found


def _yaml_value(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML") from error
