"""What a training run is: a YAML file read into a frozen dataclass, every field also a command-line option."""

import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path

import yaml


@dataclasses.dataclass(frozen=True)
class Recipe:
    """K members trained apart for `total_steps` / K steps each, for every K in `members`, and what they are compared
    with.
    """

    dataset: str  # as concat_ensemble.load_data names it
    architecture: str  # of each member: one of timm.list_models()
    input_size: list[int]  # C, H, W that members are trained at and will be fed
    total_steps: int  # spent by each ensemble in all
    dataset_config: str | None = None
    dataset_revision: str | None = None
    classes: list[int] | None = None  # train on these alone
    test_size: float = 0.3  # share held out where the dataset has no test split
    model_args: dict = dataclasses.field(default_factory=dict)
    mean: list[float] = dataclasses.field(default_factory=lambda: [0.5])  # one per channel, or one for all
    std: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    augmentation: str = "timm"  # or "scatter": each image placed anew on a noisy canvas
    members: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4])
    baseline_extra: float = 0.125  # CAT1 gets this share of steps more, as in the paper
    wide_model_args: dict = dataclasses.field(
        default_factory=dict
    )  # changes that make the single wide network, W2; none: no W2
    wide_steps: int = 0  # its steps; at equal FLOPs a quarter where widths are doubled
    batch_size: int = 64
    learning_rate: float = 2e-3  # peak of the one-cycle schedule
    weight_decay: float = 0.05
    seed: int = 0  # of the split; network n of the run is trained with seed * 100 + n
    output: str = "runs/members"

    def __post_init__(self):
        for name in ("total_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("learning_rate", "weight_decay", "baseline_extra", "wide_steps"):
            if getattr(self, name) < 0 or (name == "learning_rate" and not self.learning_rate):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be above zero."
                    if name == "learning_rate"
                    else f"{name}={getattr(self, name)} must not be below zero."
                )
        if not 0 < self.test_size < 1:
            raise ValueError(f"test_size={self.test_size} must be a share between 0 and 1.")
        if self.augmentation not in ("timm", "scatter"):
            raise ValueError(f"augmentation={self.augmentation!r} must be timm or scatter.")
        if not self.members or min(self.members) < 1 or max(self.members) > self.total_steps:
            raise ValueError(
                f"members={self.members} must be numbers of networks from 1 to total_steps={self.total_steps}."
            )
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3) or min(self.input_size) < 1:
            raise ValueError(f"input_size={self.input_size} must be [C, H, W] with 1 or 3 channels.")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.input_size[0]):
                raise ValueError(
                    f"{name}={getattr(self, name)} must have one value, or one for each of {self.input_size[0]} channels."
                )

    @classmethod
    def from_file(cls, path: Path, **changes) -> "Recipe":
        """Read a recipe; `changes` win over what it says.

        Raises:
            ValueError: naming the file and the field, when it is unknown, missing, or of another type.
        """
        try:
            given = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
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
            if not _fits(value, hints[name]):
                hint = " (YAML takes 1e-3 for text: write 0.001 or 1.0e-3)" if "float" in str(hints[name]) else ""
                raise ValueError(f"{path}: {name}={value!r} must be {_spelled(hints[name])}{hint}.")
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


def _yaml_value(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML") from error


def _fits(value, hint) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _spelled(hint) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("NoneType", "None")
