"""Configuration of a concatenation of timm backbones."""

import difflib
import functools
import inspect
import math
import os
import re
import reprlib
import shutil
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.models import build_model_with_cfg
from transformers import PreTrainedConfig

# Every saved folder carries all four, so that one with a head loads as a bare model too, and the other way round.
AUTO_MAP = {
    "AutoConfig": "configuration_concat_ensemble.ConcatEnsembleConfig",
    "AutoModel": "modeling_concat_ensemble.ConcatEnsembleModel",
    "AutoModelForImageClassification": "modeling_concat_ensemble.ConcatEnsembleForImageClassification",
    "AutoImageProcessor": "image_processing_concat_ensemble.ConcatEnsembleImageProcessor",
}
IMAGE_MODES = {1: "L", 3: "RGB"}  # PIL's mode for each number of channels
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MEMBER_KEYS = ("architecture", "model_args", "num_features", "preprocessing", "provenance")
PREPROCESSING_KEYS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "image_mode")
# What would make timm read files, reach the network, or return something other than pooled features: what it takes
# beside the arguments of a model's constructor.
REFUSED_MODEL_ARGS = sorted(
    {"device", "dtype", "features_only", "num_classes", "out_indices", "pruned"}.union(
        *(inspect.signature(function).parameters for function in (timm.create_model, build_model_with_cfg))
    )
)
PLAIN_NAME = re.compile(r"[\w.-]{0,64}")  # no path, no URL
# Keys of a config with which transformers would load files or code from elsewhere.
REFUSED_KEYS = {"adapter_config", "per_layer_config", "quantization_config", "sub_configs", "transformers_weights"}
# A stranger's numbers are bounded before anything is allocated: none of timm's models comes near these.
MOST_MEMBERS, WIDEST, LARGEST_SIDE, DEEPEST = 256, 65_536, 4_096, 16


@functools.cache
def timm_architectures() -> frozenset[str]:
    """Names that `timm.create_model` builds without the network."""
    return frozenset(timm.list_models())


def unknown_architecture(name: Any) -> str:
    """What to say to someone who asks for an architecture that timm does not have."""
    near = difflib.get_close_matches(str(name), sorted(timm_architectures()), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"architecture {name!r} is not one of timm {timm.__version__}; {hint}See timm.list_models()."


def refuse_links(folder: str | os.PathLike, *subfolders: str) -> None:
    """Raise OSError for a symbolic link among the files of `folder` and in these subfolders of it, or for one of these:
    what is written there would land where it points to."""
    inside = [Path(folder, name) for name in subfolders]
    files = [path for parent in (Path(folder), *inside) for path in parent.glob("*") if not path.is_dir()]
    link = next((path for path in inside + files if path.is_symlink()), None)
    if link is not None:
        raise OSError(f"{link} is a link to {os.readlink(link)}; remove it, or write to another folder.")


def copy_payload(folder: str | os.PathLike) -> None:
    """Copy the payload's files into `folder`, as far as they are here (a class from a repo has what it imports)."""
    here = Path(__file__).parent
    for name in sorted({f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()}):
        if (here / name).is_file() and here.resolve() != Path(folder).resolve():
            shutil.copyfile(here / name, Path(folder) / name)


class ConcatEnsembleConfig(PreTrainedConfig):
    """
    Args:
        members (`list[dict]`): The backbones, in the order of their features. Each has

            - `architecture` (`str`): one of `timm.list_models()`;
            - `model_args` (`dict`): further arguments of `timm.create_model`, plain JSON values;
            - `num_features` (`int`): width of its pooled features, as measured;
            - `preprocessing` (`dict`): `input_size` (C, H, W), `crop_pct`, `crop_mode`, `interpolation`, `mean` and
              `std` (one per channel), `image_mode` (`"RGB"` or `"L"`), with the meaning that
              `timm.data.create_transform` gives them;
            - `provenance` (`dict`): where the weights come from; shown on the card, never used to compute.
        active_members (`list[int]`, *optional*): Numbers of the members that are built; all of them when unset.
        projection_dim (`int`, *optional*): Width of a stored linear projection of the concatenation, such as its
            principal directions; `pooler_output` has as many columns then. It needs all members.
        standardize (`bool`): Whether a classification head first standardises the features with a stored mean and
            scale.
        initializer_range (`float`): Standard deviation of a new classification head.

    Raises:
        ValueError: naming the member and the bad value, when anything above does not hold.

    ```python
    >>> from concat_ensemble import ConcatEnsembleConfig
    >>> pixels = {"input_size": [3, 64, 64], "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic",
    ...           "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "image_mode": "RGB"}
    >>> member = {"architecture": "resnet18", "model_args": {}, "num_features": 512, "preprocessing": pixels, "provenance": {}}
    >>> ConcatEnsembleConfig(members=[member, member]).num_features
    1024

    ```
    """

    model_type = "concat_ensemble"
    # Without this `Trainer.predict` returns a tuple in place of the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["pooler_output", "member_features"]

    members: list[dict[str, Any]] = field(default_factory=list)
    active_members: list[int] | None = None
    projection_dim: int | None = None
    standardize: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if kwargs.get("num_labels", 0) is None:
            del kwargs["num_labels"]
        self._check_keys(kwargs)
        headless = self.id2label is None and "num_labels" not in kwargs
        super().__post_init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})
        if headless:  # else transformers gives a model without a head two labels
            self.id2label = self.label2id = None
        self.members = [_checked_member(k, member) for k, member in enumerate(self.members)]
        self.check_active_members()

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        try:
            settings = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise OSError(f"{json_file} is nested too deeply for a config; save it again.") from error
        if not isinstance(settings, dict):
            raise OSError(f"{json_file} holds no config but {_short(settings)}; save it again.")
        return settings

    def to_diff_dict(self) -> dict[str, Any]:
        # transformers leaves out what equals its default, two labels of its own naming: such a head would load as none.
        return super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}

    def _check_keys(self, others: dict[str, Any]) -> None:
        """Raise ValueError for what is no ensemble's, before transformers makes attributes or labels of it."""
        for key, value in others.items():
            found = getattr(type(self), key, None)
            taken = found is not None and key != "model_type" and not getattr(found, "fset", None)
            private = key.startswith("_") and key not in ("_commit_hash", "_name_or_path")
            nested = isinstance(value, dict) and key != "auto_map"  # such as custom_pipelines
            if taken or private or nested or key in REFUSED_KEYS:
                raise ValueError(f"{key!r} is not a key of an ensemble's config; remove it.")
        dtype = others.get("torch_dtype") if self.dtype is None else self.dtype
        labels, numbers = self.id2label, self.label2id
        attention, number = others.get("attn_implementation"), others.get("num_labels", 0)
        checks = {
            "members": (self.members, isinstance(self.members, list | tuple) and len(self.members) <= MOST_MEMBERS, f"a list of up to {MOST_MEMBERS} members"),
            "projection_dim": (self.projection_dim, self.projection_dim is None or _whole(self.projection_dim, 1), f"a whole number above zero, up to {WIDEST:,}"),
            "standardize": (self.standardize, isinstance(self.standardize, bool), "true or false"),
            "initializer_range": (self.initializer_range, type(self.initializer_range) in (int, float) and 0 <= self.initializer_range <= WIDEST, "a number, not below zero"),
            "num_labels": (number, _whole(number, 0), f"a whole number up to {WIDEST:,}"),
            "id2label": (labels, labels is None or (isinstance(labels, dict) and len(labels) <= WIDEST and all(str(n).isdecimal() for n in labels)), f"names by numbers, up to {WIDEST:,}"),
            "label2id": (numbers, numbers is None or (isinstance(numbers, dict) and all(type(n) is int for n in numbers.values())), "numbers by names"),
            "dtype": (dtype, dtype is None or isinstance(getattr(torch, dtype, None) if isinstance(dtype, str) else dtype, torch.dtype), "one of torch's, such as 'float32'"),
            "attn_implementation": (attention, attention in (None, "eager", "sdpa"), "left out: timm's layers choose it themselves"),
        }  # fmt: skip
        for name, (value, holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"{name}={_short(value)} must be {wanted}.")

    def check_active_members(self) -> None:
        """Raise ValueError unless `active_members` names members, each once. Called again by the model:
        `from_pretrained` sets the field later.
        """
        active = self.active_members
        if active is None:
            return
        if self.projection_dim is not None:
            raise ValueError(
                "a projection needs all members; load some with "
                "ConcatEnsembleModel.from_pretrained(..., active_members=[...], projection_dim=None)."
            )
        numbers_only = isinstance(active, list | tuple) and all(type(k) is int for k in active)
        if (
            not numbers_only
            or not active
            or len(set(active)) < len(active)
            or not set(active) <= set(range(len(self.members)))
        ):
            raise ValueError(
                f"active_members={active!r}: give different member numbers from 0 to {len(self.members) - 1}, or leave it out for all members."
            )

    @property
    def built_members(self) -> list[int]:
        """Numbers of the members that a model with this configuration holds, in the order of their features."""
        return list(range(len(self.members))) if self.active_members is None else list(self.active_members)

    @property
    def num_features(self) -> int:
        """Width of `pooler_output`: the projection's, or the sum over the members that are built."""
        return self.projection_dim or self.num_member_features

    @property
    def num_member_features(self) -> int:
        """Width of the concatenation: the sum over the members that are built."""
        return sum(self.members[k]["num_features"] for k in self.built_members)

    @property
    def geometries(self) -> list[dict[str, Any]]:
        """The distinct ways in which members cut and resize an image, numbered over all members; `mean` and `std` are
        those of the first member that has it (the others get theirs from it inside the model)."""
        first = {}
        for member in self.members:
            first.setdefault(_geometry_key(member["preprocessing"]), member["preprocessing"])
        return list(first.values())

    def geometry_of(self, member: int) -> int:
        """Which of `geometries` the member sees."""
        keys = [_geometry_key(geometry) for geometry in self.geometries]
        return keys.index(_geometry_key(self.members[member]["preprocessing"]))

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of one image in `pixel_values`: (C, H, W) with one geometry, else (G, C, H, W) with the largest C, H
        and W.
        """
        sizes = [geometry["input_size"] for geometry in self.geometries]
        largest = tuple(max(axis) for axis in zip(*sizes, strict=True))
        return largest if len(sizes) == 1 else (len(sizes), *largest)


def _geometry_key(preprocessing: dict[str, Any]) -> tuple:
    key = tuple(preprocessing[name] for name in ("crop_pct", "crop_mode", "interpolation", "image_mode"))
    # timm fills the border with the mean, so there a member with another mean sees another image.
    border = tuple(preprocessing["mean"]) if preprocessing["crop_mode"] == "border" else ()
    return (*preprocessing["input_size"], *key, *border)


def _checked_member(k: int, member: Any) -> dict[str, Any]:
    """A copy with lists in place of tuples, or a ValueError that names the member and the value."""

    def refuse(problem: str):
        raise ValueError(f"members[{k}]: {problem}")

    if (
        not isinstance(member, dict)
        or set(member) - set(MEMBER_KEYS)
        or {"architecture", "num_features", "preprocessing"} - set(member)
    ):
        got = sorted(map(str, member)) if isinstance(member, dict) else member
        refuse(f"got {_short(got)}; a member is a dict with the keys {', '.join(MEMBER_KEYS)}.")
    architecture, width = member["architecture"], member["num_features"]
    if not isinstance(architecture, str) or architecture not in timm_architectures():
        refuse(unknown_architecture(architecture))
    if not _whole(width, 1):
        refuse(f"num_features={_short(width)} must be a whole number above zero, up to {WIDEST:,}.")
    model_args = checked_model_args(member.get("model_args") or {}, refuse)
    provenance = _plain(
        member.get("provenance") or {},
        lambda value: refuse(f"provenance holds {_short(value)}; only plain JSON values are taken."),
    )
    if not isinstance(provenance, dict):
        refuse(f"provenance={_short(provenance)} must be a dict.")
    preprocessing = checked_preprocessing(member["preprocessing"], refuse)
    if model_args.get("in_chans", 3) != preprocessing["input_size"][0]:
        refuse(
            f"input_size {preprocessing['input_size']} does not have the model's {model_args.get('in_chans', 3)} channels."
        )
    return {
        "architecture": architecture,
        "model_args": model_args,
        "num_features": width,
        "preprocessing": preprocessing,
        "provenance": provenance,
    }


def checked_model_args(given: Any, refuse) -> dict[str, Any]:
    """Arguments of a timm model's constructor as plain JSON values with lists in place of tuples; `refuse(problem)` raises
    on anything with which timm could do more than construct."""
    model_args = _plain(
        given, lambda value: refuse(f"model_args holds {_short(value)}; only plain JSON values are taken.")
    )
    if not isinstance(model_args, dict):
        refuse(f"model_args={_short(model_args)} must be a dict.")
    if strange := [name for name in model_args if not PLAIN_NAME.fullmatch(name)]:
        refuse(f"model_args has the key {_short(strange[0])}, which is no argument's name.")
    for name in sorted(set(model_args) & set(REFUSED_MODEL_ARGS)):
        refuse(f"model_args may not hold {name!r}; weights come from the checkpoint and features are pooled.")
    for value in _leaves(model_args):
        if isinstance(value, str) and not PLAIN_NAME.fullmatch(value):
            refuse(f"model_args holds {_short(value)}; no paths and no addresses, only plain names are taken.")
        if isinstance(value, int | float) and abs(value) > WIDEST:
            refuse(f"model_args holds {_short(value)}; numbers go up to {WIDEST:,}.")
    return model_args


def checked_preprocessing(given: Any, refuse) -> dict[str, Any]:
    """What a member sees, complete and with lists in place of tuples; `refuse(problem)` raises."""
    if not isinstance(given, dict) or set(given) != set(PREPROCESSING_KEYS):
        got = sorted(map(str, given)) if isinstance(given, dict) else given
        refuse(f"preprocessing {_short(got)} must have exactly the keys {', '.join(PREPROCESSING_KEYS)}.")
    pixels = _plain(
        given, lambda value: refuse(f"preprocessing holds {_short(value)}; only plain JSON values are taken.")
    )
    size, mode = pixels["input_size"], pixels["image_mode"]
    if (
        not isinstance(size, list)
        or len(size) != 3
        or not all(_whole(n, 1, LARGEST_SIDE) for n in size)
        or size[0] not in IMAGE_MODES
    ):
        refuse(
            f"input_size={_short(size)} must be [C, H, W] with 1 or 3 channels and up to {LARGEST_SIDE:,} pixels a side."
        )
    if mode != IMAGE_MODES[size[0]]:
        refuse(f"image_mode={mode!r} must be {IMAGE_MODES[size[0]]!r} for {size[0]} channels.")
    if type(pixels["crop_pct"]) not in (int, float) or not 0.1 <= pixels["crop_pct"] <= 10:
        refuse(f"crop_pct={_short(pixels['crop_pct'])} must be a number from 0.1 to 10.")
    for name, allowed in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
        if pixels[name] not in allowed:
            refuse(f"{name}={pixels[name]!r} must be one of {', '.join(allowed)}.")
    for name in ("mean", "std"):
        values = pixels[name]
        if (
            not isinstance(values, list)
            or len(values) != size[0]
            or not all(type(v) in (int, float) and abs(v) <= WIDEST for v in values)
        ):
            refuse(f"{name}={_short(values)} must be {size[0]} numbers, one per channel.")
    if min(pixels["std"]) <= 0:
        refuse(f"std={pixels['std']!r} must be above zero.")
    return pixels


def _plain(value: Any, refuse, depth: int = DEEPEST) -> Any:
    """`value` with tuples as lists; `refuse(value)` on what JSON cannot hold, and on what is nested beyond use."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and depth:
        return {key: _plain(item, refuse, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, refuse, depth - 1) for item in value]
    if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    return refuse(value)


def _leaves(value: Any) -> list:
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]


def _whole(value: Any, least: int, most: int = WIDEST) -> bool:
    return type(value) is int and least <= value <= most


def _short(value: Any) -> str:
    """For messages: what a stranger wrote may be long."""
    text = reprlib.repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."
