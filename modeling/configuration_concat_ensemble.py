"""Configuration of a concatenation of timm backbones."""

import difflib
import functools
import inspect
import math
import os
import re
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.models import build_model_with_cfg
from transformers import PreTrainedConfig

# Every saved folder has all four, so that one with a head loads as a bare model too, and the other way round.
AUTO_MAP = {
    "AutoConfig": "configuration_concat_ensemble.ConcatEnsembleConfig",
    "AutoModel": "modeling_concat_ensemble.ConcatEnsembleModel",
    "AutoModelForImageClassification": "modeling_concat_ensemble.ConcatEnsembleForImageClassification",
    "AutoImageProcessor": "image_processing_concat_ensemble.ConcatEnsembleImageProcessor",
}
PAYLOAD_FILES = {f"{part}_concat_ensemble.py" for part in ("configuration", "image_processing", "modeling", "weights")}
IMAGE_MODES = {1: "L", 3: "RGB"}  # PIL's mode for each number of channels
CHANNELS = "channels"  # the image_mode of members that see channels of an array by number, as listed under this key
DTYPES = ("float32", "float16", "bfloat16", "float64")  # in which networks compute
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MEMBER_KEYS = ("architecture", "model_args", "num_features", "preprocessing", "provenance")
PREPROCESSING_KEYS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "image_mode")
# timm's arguments that would read files, reach the network or return something other than pooled features.
_TIMM_ARGS = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
_OUTPUT_ARGS = {"device", "dtype", "features_only", "num_classes", "out_indices", "pruned"}
REFUSED_MODEL_ARGS = sorted(_TIMM_ARGS | _OUTPUT_ARGS)
PLAIN_NAME = re.compile(r"[\w.-]{0,64}")  # no path, no URL
# Keys of a config with which transformers would load files or code from elsewhere.
REFUSED_KEYS = {"adapter_config", "per_layer_config", "quantization_config", "sub_configs", "transformers_weights"}
# Bounds for a stranger's numbers, before anything is allocated; MAX_NUMBER is for features, labels and arguments.
MAX_MEMBERS, MAX_NUMBER, MAX_IMAGE_SIDE, MAX_NESTING = 256, 65_536, 4_096, 16
MAX_ARGUMENTS, MAX_SUM = 10_000, 2**20  # of a member's model_args: their characters, and the sum of their numbers
MAX_JSON = 2**24  # bytes of a file
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MAX_CHANNELS, MAX_IMAGE_CHANNELS = 32, 256  # of a member, and of the images that it sees some channels of


@functools.cache
def timm_architectures() -> frozenset[str]:
    """Names that `timm.create_model` builds without the network."""
    return frozenset(timm.list_models())


def describe_unknown_architecture(name: Any) -> str:
    """Error message for an architecture that timm does not have, with similar names that it has."""
    similar = difflib.get_close_matches(str(name)[:200], sorted(timm_architectures()), n=3)
    hint = f"did you mean {' or '.join(similar)}? " if similar else ""
    shown = repr(name[:200]) if isinstance(name, str) else reprlib.repr(name)
    return f"architecture {shown} is not one of timm {timm.__version__}; {hint}See timm.list_models()."


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put `prefix` in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


def refuse_links(folder: str | os.PathLike, *subfolders: str) -> None:
    """Raise OSError for a link among the files in `folder`, these subfolders and the files in them."""
    inside = [Path(folder, name) for name in subfolders]
    files = [path for parent in (Path(folder), *inside) for path in parent.glob("*") if not path.is_dir()]
    for path in inside + files:
        if path.is_symlink():  # what it points to would be overwritten
            raise OSError(f"{path} is a link to {os.readlink(path)}; remove it, or write to another folder.")


def copy_payload(folder: str | os.PathLike) -> None:
    """Copy the payload into `folder`; for a class loaded from a repo, those files that transformers has fetched."""
    source = Path(__file__).parent
    for name in PAYLOAD_FILES:
        if (source / name).is_file() and source.resolve() != Path(folder).resolve():
            shutil.copyfile(source / name, Path(folder) / name)


def check_json_size(path: str | os.PathLike) -> None:
    """Raise OSError for a file that is larger than any of ours, before it takes 30 times as much memory."""
    if (size := os.path.getsize(path)) > MAX_JSON:
        raise OSError(f"{path} has {size:,} bytes, more than {MAX_JSON:,}; save it again.")


def refuse_methods(kind: type, settings: dict[str, Any]) -> None:
    """Raise ValueError for a setting that would take the place of a method of the class that gets it."""
    for name in settings:
        if name == "self" or callable(getattr(kind, name, None)):
            raise ValueError(f"{_short(name)} is no setting of {kind.__name__}, but its own; leave it out.")


class ConcatEnsembleConfig(PreTrainedConfig):
    """Everything is checked when a config is made: a ValueError names the member and the bad value.

    Args:
        members (list[dict]): The backbones, in the order of their features. Each has

            - `architecture` (`str`): one of `timm.list_models()`;
            - `model_args` (`dict`): further arguments of `timm.create_model`, plain JSON values;
            - `num_features` (`int`): number of its pooled features, as measured;
            - `preprocessing` (`dict`): `input_size` (C, H, W), `crop_pct`, `crop_mode`, `interpolation`, `mean` and
              `std` (one per channel), `image_mode` (`"RGB"` or `"L"`), with the meaning that
              `timm.data.create_transform` gives them; with the `image_mode` `"channels"` also `channels`, a list of C
              numbers: which channels of an image the member sees (C from 1 to 32, numbers from 0 to 255);
            - `provenance` (`dict`): where the weights come from; shown on the card, never used to compute.
        active_members (list[int], optional): Numbers of the members to build; defaults to all of them.
        projection_dim (int, optional): Number of features of a stored linear projection of the concatenation, such
            as its principal directions; `pooler_output` has as many columns then. A projection needs all members.
        standardize (bool, optional): Whether a classification head first standardizes the features with a stored mean
            and scale. Default: False.
        dynamic_img_size (bool, optional): Whether the model takes images of any height and width that its members can
            take, instead of those of their `preprocessing` alone. All members must resize and crop alike. Default:
            False.
        initializer_range (float, optional): Standard deviation of the weights of a new classification head. Default:
            0.02.
    """

    model_type = "concat_ensemble"
    # Without this `Trainer.predict` returns a tuple in place of the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["pooler_output", "member_features", "hidden_states"]

    members: list[dict[str, Any]] = field(default_factory=list)
    active_members: list[int] | None = None
    projection_dim: int | None = None
    standardize: bool = False
    dynamic_img_size: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if kwargs.get("num_labels", 0) is None:
            del kwargs["num_labels"]
        _check_other_keys(type(self), kwargs)  # before transformers makes attributes of them
        self._check_values(kwargs)
        has_head = self.id2label is not None or "num_labels" in kwargs
        super().__post_init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})
        if not has_head:  # transformers gives every model two labels
            self.id2label = self.label2id = None
        self.members = [_validate_member(k, member) for k, member in enumerate(self.members)]
        self.check_active_members()
        self.check_dynamic_img_size()

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        check_json_size(json_file)
        try:
            settings = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise OSError(f"{json_file} is nested too deeply for a config; save it again.") from error
        if not isinstance(settings, dict):
            raise OSError(f"{json_file} must hold a JSON object, not {_short(settings)}; save it again.")
        refuse_methods(cls, settings)
        return settings

    def to_diff_dict(self) -> dict[str, Any]:
        # transformers leaves out its defaults; a head with two labels of its own naming would be lost.
        settings = super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}
        # Configs without it stay as earlier versions wrote them, and readable by them.
        return {key: value for key, value in settings.items() if key != "dynamic_img_size" or value}

    def _check_values(self, others: dict[str, Any]) -> None:
        """Raise ValueError for a value that is not allowed, of a field here or of one of transformers' in `others`."""
        is_list = isinstance(self.members, list | tuple) and len(self.members) <= MAX_MEMBERS
        require(is_list, "members", self.members, f"a list of up to {MAX_MEMBERS} members")
        dim, scale = self.projection_dim, self.initializer_range
        require(dim is None or _is_whole(dim, 1), "projection_dim", dim, f"a whole number from 1 to {MAX_NUMBER:,}")
        require(isinstance(self.standardize, bool), "standardize", self.standardize, "true or false")
        require(_is_number(scale) and scale >= 0, "initializer_range", scale, "a number that is not below zero")
        self._check_labels(others.get("num_labels", 0))
        dtypes = (None, *DTYPES, *(getattr(torch, name) for name in DTYPES))
        for key, dtype in (("dtype", self.dtype), ("torch_dtype", others.get("torch_dtype"))):
            require(dtype in dtypes, key, dtype, f"one of {', '.join(DTYPES)}")
        kind = others.get("attn_implementation")
        require(kind in (None, "eager", "sdpa"), "attn_implementation", kind, "left out: timm's layers choose it")

    def _check_labels(self, num_labels: Any) -> None:
        names, numbers = self.id2label, self.label2id
        require(_is_whole(num_labels, 0), "num_labels", num_labels, f"a whole number from 0 to {MAX_NUMBER:,}")
        is_dict = isinstance(names, dict) and len(names) <= MAX_NUMBER and all(str(n).isdecimal() for n in names)
        require(names is None or is_dict, "id2label", names, f"names by number, up to {MAX_NUMBER:,}")
        # transformers' example scripts write the numbers as strings.
        is_dict = isinstance(numbers, dict) and all(
            type(n) is int or (isinstance(n, str) and n.isdecimal()) for n in numbers.values()
        )
        require(numbers is None or is_dict, "label2id", numbers, "numbers by name")

    def check_active_members(self) -> None:
        """Raise ValueError unless `active_members` is valid; for models, too, as `from_pretrained` sets it later."""
        active, count = self.active_members, len(self.members)
        if active is None:
            return
        if self.projection_dim is not None:
            remedy = "ConcatEnsembleModel.from_pretrained(..., active_members=[...], projection_dim=None)"
            raise ValueError(f"a projection needs all members; load some with {remedy}.")
        are_numbers = isinstance(active, list | tuple) and all(_is_whole(k, 0, count - 1) for k in active)
        is_valid = are_numbers and 0 < len(active) == len(set(active))
        expected = f"different member numbers from 0 to {count - 1}; leave it out for all members"
        require(is_valid, "active_members", active, expected)

    def check_dynamic_img_size(self) -> None:
        """Raise ValueError unless `dynamic_img_size` is valid; for models, too, as `from_pretrained` sets it later."""
        dynamic, count = self.dynamic_img_size, len(self.geometries)
        require(isinstance(dynamic, bool), "dynamic_img_size", dynamic, "true or false")
        reason = f"False for members with {count} ways to resize and crop, whose pixels are padded to one fixed size"
        remedy = "assemble them with preprocessing='shared'"
        require(not dynamic or count < 2, "dynamic_img_size", dynamic, f"{reason}; or {remedy}")

    @property
    def built_members(self) -> list[int]:
        """Numbers of the members that a model with this configuration has, in the order of their features."""
        return list(range(len(self.members))) if self.active_members is None else list(self.active_members)

    @property
    def num_features(self) -> int:
        """Number of columns of `pooler_output`: `projection_dim`, or the sum over the members that are built."""
        return self.projection_dim or self.num_member_features

    @property
    def num_member_features(self) -> int:
        """Number of features before a projection: the sum over the members that are built."""
        return sum(self.members[k]["num_features"] for k in self.built_members)

    @property
    def geometries(self) -> list[dict[str, Any]]:
        """The distinct ways in which members resize and crop an image, numbered over all members. `mean` and `std` are
        those of the first member with this geometry; the model derives the pixels of the others from its pixels.
        Members that name their `channels` share a geometry with all of these."""
        geometries = {}
        for member in self.members:
            pixels = member["preprocessing"]
            key = _geometry_key(pixels)
            geometries[key] = _add_channels(geometries[key], pixels) if key in geometries else pixels
        return list(geometries.values())

    def geometry_index(self, member: int) -> int:
        """Index in `geometries` of the member's geometry."""
        keys = [_geometry_key(geometry) for geometry in self.geometries]
        return keys.index(_geometry_key(self.members[member]["preprocessing"]))

    geometry_of = geometry_index  # deprecated: the name in 0.1

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of one image in `pixel_values`: (C, H, W), or the largest (G, C, H, W) with several geometries."""
        sizes = [geometry["input_size"] for geometry in self.geometries]
        largest = tuple(max(axis) for axis in zip(*sizes, strict=True))
        return largest if len(sizes) == 1 else (len(sizes), *largest)


def _geometry_key(preprocessing: dict[str, Any]) -> tuple:
    key = tuple(preprocessing[name] for name in ("crop_pct", "crop_mode", "interpolation", "image_mode"))
    # timm fills the border with the mean, so there a member with another mean sees another image.
    border = tuple(preprocessing["mean"]) if preprocessing["crop_mode"] == "border" else ()
    channels, *size = preprocessing["input_size"]
    if CHANNELS in preprocessing:  # each channel is resized by itself
        channels = tuple(preprocessing[CHANNELS]) if border else None
    return (channels, *size, *key, *border)


def _add_channels(geometry: dict[str, Any], pixels: dict[str, Any]) -> dict[str, Any]:
    """`geometry` with those channels of `pixels` that it lacks, each with its mean and std."""
    new = [place for place, number in enumerate(pixels.get(CHANNELS, ())) if number not in geometry[CHANNELS]]
    if not new:
        return geometry
    added = {key: geometry[key] + [pixels[key][place] for place in new] for key in (CHANNELS, "mean", "std")}
    return geometry | added | {"input_size": [len(added["mean"]), *geometry["input_size"][1:]]}


def _check_other_keys(config_class: type, others: dict[str, Any]) -> None:
    """Raise ValueError for a key that no ensemble's config has."""
    for key, value in others.items():
        attribute = getattr(config_class, key, None)
        is_settable = attribute is None or key == "model_type" or getattr(attribute, "fset", None)
        is_private = key.startswith("_") and key not in ("_commit_hash", "_name_or_path")
        is_nested = isinstance(value, dict) and key != "auto_map"  # such as custom_pipelines
        if not is_settable or is_private or is_nested or key in REFUSED_KEYS:
            raise ValueError(f"{key!r} is not a key of an ensemble's config; remove it.")


def _validate_member(k: int, member: Any) -> dict[str, Any]:
    """A copy of a member's entry with lists in place of tuples."""
    with error_prefix(f"members[{k}]"):
        keys = set(member) if isinstance(member, dict) else set()
        if keys - set(MEMBER_KEYS) or {"architecture", "num_features", "preprocessing"} - keys:
            content = _short(list(member) if isinstance(member, dict) else member)
            raise ValueError(f"a member must be a dict with the keys {', '.join(MEMBER_KEYS)}, not {content}.")
        architecture, num_features = member["architecture"], member["num_features"]
        if not isinstance(architecture, str) or architecture not in timm_architectures():
            raise ValueError(describe_unknown_architecture(architecture))
        require(_is_whole(num_features, 1), "num_features", num_features, f"a whole number from 1 to {MAX_NUMBER:,}")
        model_args = validate_model_args(member.get("model_args") or {})
        provenance = _copy_json(member.get("provenance") or {}, "provenance")
        require(isinstance(provenance, dict), "provenance", provenance, "a dict")
        preprocessing = validate_preprocessing(member["preprocessing"])
        size, channels = preprocessing["input_size"], model_args.get("in_chans", 3)
        require(size[0] == channels, "input_size", size, f"of the model's {channels} channels")
        return dict(zip(MEMBER_KEYS, (architecture, model_args, num_features, preprocessing, provenance), strict=True))


def validate_model_args(model_args: Any) -> dict[str, Any]:
    """A copy of arguments for a timm model's constructor, with lists in place of tuples. Raises ValueError for those
    with which timm could do more than construct a network."""
    model_args = _copy_json(model_args, "model_args")
    require(isinstance(model_args, dict), "model_args", model_args, "a dict")
    for name in model_args:
        if not PLAIN_NAME.fullmatch(name):
            raise ValueError(f"model_args has the key {_short(name)}, which is no argument's name.")
        if name in REFUSED_MODEL_ARGS:
            raise ValueError(f"model_args may not hold {name!r}; it does more than construct a network, so remove it.")
    length, leaves = len(repr(model_args)), _list_leaves(model_args)
    if length > MAX_ARGUMENTS:
        raise ValueError(f"model_args has {length:,} characters; use up to {MAX_ARGUMENTS:,}.")
    for value in leaves:
        if isinstance(value, str) and not PLAIN_NAME.fullmatch(value):
            raise ValueError(f"model_args holds {_short(value)}; use plain names only, no paths and no addresses.")
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise ValueError(f"model_args holds {_short(value)}; numbers go up to {MAX_NUMBER:,}.")
    total = sum(abs(value) for value in leaves if isinstance(value, int | float))
    require(total <= MAX_SUM, "the sum of model_args", total, f"up to {MAX_SUM:,}")
    return model_args


def validate_preprocessing(preprocessing: Any, max_channels: int = MAX_CHANNELS) -> dict[str, Any]:
    """A copy of a member's preprocessing with lists in place of tuples. Raises ValueError for a missing or unknown key
    and for a value that is not allowed."""
    if not isinstance(preprocessing, dict) or set(preprocessing) - {CHANNELS} != set(PREPROCESSING_KEYS):
        content = _short(list(preprocessing) if isinstance(preprocessing, dict) else preprocessing)
        raise ValueError(f"preprocessing {content} must have exactly the keys {', '.join(PREPROCESSING_KEYS)}.")
    pixels = _copy_json(preprocessing, "preprocessing")
    size, mode, crop = pixels["input_size"], pixels["image_mode"], pixels["crop_pct"]
    is_size = isinstance(size, list) and len(size) == 3 and all(_is_whole(n, 1, MAX_IMAGE_SIDE) for n in size)
    expected = f"[C, H, W] with 1 to {max_channels} channels and up to {MAX_IMAGE_SIDE:,} pixels a side"
    require(is_size and size[0] <= max_channels, "input_size", size, expected)
    channels = size[0]
    _check_channels(size, mode, pixels)
    require(_is_number(crop) and 0.1 <= crop <= 10, "crop_pct", crop, "a number from 0.1 to 10")
    require(crop <= min(size[1:]), "crop_pct", crop, f"smaller: it leaves no pixel of input_size={size}")
    for name, allowed in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
        require(pixels[name] in allowed, name, pixels[name], f"one of {', '.join(allowed)}")
    for name in ("mean", "std"):
        values = pixels[name]
        are_numbers = isinstance(values, list) and len(values) == channels and all(map(_is_number, values))
        require(are_numbers, name, values, f"{channels} numbers, one per channel")
    require(min(pixels["std"]) > 1e-30, "std", pixels["std"], "above zero")  # 1 / std must be a float32
    return pixels


def _check_channels(size: list[int], mode: Any, pixels: dict[str, Any]) -> None:
    """Raise ValueError unless `mode` and, if there is such a key, the channels' numbers go with the size."""
    count: int = size[0]
    numbers: Any = pixels.get(CHANNELS)
    if CHANNELS not in pixels:
        require(count in IMAGE_MODES, "input_size", size, f"of 1 or 3 channels, or beside {CHANNELS!r}, their numbers")
        expected = f"{IMAGE_MODES[count]!r} for {count} channels, or {CHANNELS!r} beside a list of their numbers"
        require(mode == IMAGE_MODES[count], "image_mode", mode, expected)
        return
    is_list = isinstance(numbers, list) and len(numbers) == count
    are_numbers = is_list and all(_is_whole(n, 0, MAX_IMAGE_CHANNELS - 1) for n in numbers)
    expected = f"{count} numbers from 0 to {MAX_IMAGE_CHANNELS - 1}: which channels of an image the member sees"
    require(are_numbers, CHANNELS, numbers, expected)
    require(mode == CHANNELS, "image_mode", mode, f"{CHANNELS!r} beside a list of channels")


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={_short(value)} must be {expected}.")


def _is_whole(value: Any, least: int, most: int = MAX_NUMBER) -> bool:
    return type(value) is int and least <= value <= most  # not isinstance: True is an int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # which NaN is not


def _copy_json(value: Any, name: str, depth: int = MAX_NESTING) -> Any:
    """A copy with lists in place of tuples. Raises ValueError if it is nested too deeply or JSON cannot hold it."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and depth:
        return {key: _copy_json(item, name, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_copy_json(item, name, depth - 1) for item in value]
    if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    raise ValueError(f"{name} holds {_short(value)}; use plain JSON values only.")


def _list_leaves(value: Any) -> list:
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _list_leaves(item)]
    return [value]


def _short(value: Any) -> str:
    return reprlib.repr(value)[:200]  # a stranger's value may be long
