"""Several timm backbones as one transformers model: the concatenation of their pooled features."""

import copy
import filecmp
import functools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as registration
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.hub import cached_file, cached_files

from .configuration_concat_ensemble import ConcatEnsembleConfig
from .configuration_concat_ensemble import refuse_links
from .image_processing_concat_ensemble import ConcatEnsembleImageProcessor


INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"(?:member-(?P<member>\d+)|projection|head|model)(?:-\d{5}-of-\d{5})?\.safetensors")
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")
CARD_PARTS = ("README.md", "LICENSE.md", "results", "figures", ".eval_results")
# Of a network that timm builds, and of a head: beyond the largest of timm's, and short of hours and of all memory.
MOST_WEIGHTS, MOST_MODULES, LARGEST_HEAD = 10**10, 20_000, 2**30
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class ConcatEnsembleModelOutput(ModelOutput):
    """
    Args:
        pooler_output: (B, sum of the built members' `num_features`): the members' pooled features side by side, in
            member order; (B, `projection_dim`) where the ensemble has a projection.
        member_features: One (B, `num_features`) tensor per built member, with `output_member_features=True`.
    """

    pooler_output: torch.Tensor | None = None
    member_features: tuple[torch.Tensor, ...] | None = None


@dataclass
class ConcatEnsembleImageClassifierOutput(ModelOutput):
    """
    Args:
        loss: Scalar, with `labels`.
        logits: (B, `num_labels`).
        pooler_output: (B, sum of `num_features`, or `projection_dim`): what the head saw, before it is standardised.
        member_features: One (B, `num_features`) tensor per member, with `output_member_features=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    member_features: tuple[torch.Tensor, ...] | None = None


class ConcatEnsemblePreTrainedModel(PreTrainedModel):
    """Holds the members, loads and saves them; the two classes below add what they return."""

    config: ConcatEnsembleConfig
    config_class = ConcatEnsembleConfig
    base_model_prefix = ""  # members sit in both classes alike, so a member's file is the same with and without a head
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    model_tags = ["concat-ensemble", "timm"]  # noqa: RUF012 (as transformers has it)
    accepts_loss_kwargs = False
    card_writer = (
        None  # `push_to_hub` makes a card with it: the installed package's, which a class from a repo has not
    )
    _supports_sdpa = True  # timm's attention layers choose it themselves

    def __init__(self, config: ConcatEnsembleConfig):
        super().__init__(config)
        config.check_active_members()
        if not config.members:
            raise ValueError("members is empty; an ensemble needs at least one: see concat_ensemble.assemble.")
        self.members = nn.ModuleDict({str(k): _create_member(config, k) for k in config.built_members})
        width = config.projection_dim
        self.projection = None if width is None else nn.Linear(config.num_member_features, width)
        self.members_frozen = False
        self._pixel_shape = config.pixel_shape
        self._member_pixels = {str(k): _pixels_of_member(config, k) for k in config.built_members}
        self.supports_gradient_checkpointing = any(map(_can_checkpoint, self.members.values()))
        # `device_map="auto"` places whole members: timm's blocks hold views across submodules that accelerate would
        # separate.
        self._no_split_modules = {type(member).__name__ for member in self.members.values()}
        inactive = [k for k in range(len(config.members)) if k not in config.built_members]
        self._keys_to_ignore_on_load_unexpected = {rf"^members\.{k}\." for k in inactive}

    def forward_members(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each built member's pooled features, (B, `num_features`), from the processor's `pixel_values`.

        Raises:
            ValueError: when `pixel_values` is not of the shape that the configuration asks for.
        """
        expected = self._pixel_shape
        if pixel_values.ndim != len(expected) + 1 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this ensemble wants (B, {', '.join(map(str, expected))}), "
                "as its own image processor makes them."
            )
        features = []
        for name, member in self.members.items():
            weight = next(member.parameters())
            pooled = member(self._member_pixels[name](pixel_values.to(weight.device, weight.dtype)))
            width = self.config.members[int(name)]["num_features"]
            if pooled.ndim != 2 or pooled.shape[1] != width:
                raise ValueError(
                    f"members[{name}] gave features of shape {tuple(pooled.shape)}; its configuration says pooled ones, (B, {width})."
                )
            features.append(pooled.to(pixel_values.device))
        return tuple(features)

    def pool(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(B, `num_features` of the configuration): the members' features side by side, projected where there is a
        projection."""
        pooled = torch.cat(features, dim=1)
        return pooled if self.projection is None else self.projection(pooled.to(self.projection.weight.dtype))

    def freeze_members(self, frozen: bool = True) -> None:
        """Stop (or resume) the training of the members. Frozen ones stay in evaluation mode whatever `train()` says:
        `requires_grad=False` alone lets BatchNorm's statistics move."""
        self.members_frozen = frozen
        self.members.requires_grad_(not frozen)
        self.train(self.training)

    @torch.no_grad()
    def fold_batchnorm(self):
        """For faster inference, put each BatchNorm that alone follows a convolution into the convolution's weights and
        bias. Features stay the same up to rounding; members without BatchNorm stay as they are, and so do other
        ensembles that share the members. Folding twice is folding once. A folded model can be neither saved nor
        trained: `save_pretrained` and `train()` refuse it.

        Returns:
            The model itself.

        Raises:
            ValueError: in training mode, where statistics move, and for a member that it would change.
        """
        if any(module.training for module in self.modules()):
            raise ValueError("fold_batchnorm() is for evaluation; call eval() first, and fold after training.")
        pixels = torch.rand(1, *self._pixel_shape, generator=torch.Generator().manual_seed(0))
        folded = {}
        for name, member in self.members.items():
            try:
                folded[name] = _folded(member, self._member_pixels[name](pixels))
            except ValueError as error:
                raise ValueError(f"members[{name}]: {error}") from error
        self.members.update(folded)
        return self

    def _check_not_folded(self, action: str) -> None:
        if any(isinstance(module, _FoldedBatchNorm) for module in self.members.modules()):
            raise ValueError(f"a model after fold_batchnorm() cannot be {action}; load or assemble it anew for that.")

    def train(self, mode: bool = True):
        if mode:
            self._check_not_folded("trained")
        super().train(mode)
        if self.members_frozen:
            self.members.eval()
        return self

    def get_input_embeddings(self):
        return None  # images have none

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        for member in filter(_can_checkpoint, self.members.values()):
            member.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module):
        # `from_pretrained` builds on the meta device and leaves non-persistent buffers as uninitialised memory
        # (transformers #48892): Swin crashes on it, EVA02 is silently wrong. Nothing else of timm's is touched: member
        # weights that are missing are an error.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As `PreTrainedModel.from_pretrained`, and strict: a missing or unexpected key of a built member raises.

        Args:
            active_members (`list[int]`, *optional*): Build these members only; only their files are read or fetched.

        Raises:
            ValueError: for missing or unexpected member weights or other shapes, before they take memory; for bad
                `active_members`, and a `device_map` that offloads to disk.
            OSError: for a shard that is missing, truncated, or named outside the folder, and for weights that are not
                safetensors (pickles are read, tensors only, with `use_safetensors=False`).
        """
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        name = pretrained_model_name_or_path
        if not isinstance(config, PreTrainedConfig):
            config = name if config is None else config
            settings = ConcatEnsembleConfig.get_config_dict(config, **hub)[0]
            wanted = kwargs.get("active_members", settings.get("active_members"))
            projection = kwargs.get("projection_dim", settings.get("projection_dim"))
            # Refuses bad numbers before any file is fetched.
            asked = ConcatEnsembleConfig(
                members=settings.get("members", []), active_members=wanted, projection_dim=projection
            )
        else:
            config.check_active_members()
            asked, wanted, projection = config, config.active_members, config.projection_dim
        index, files = _index_of_members(cls, name, wanted, projection is not None, hub)
        if files:
            _check_fit(asked, files, name)
        with tempfile.TemporaryDirectory() as folder:
            if index is not None:
                (Path(folder) / hub.get("subfolder", "")).mkdir(parents=True, exist_ok=True)
                (Path(folder) / hub.get("subfolder", "") / INDEX_NAME).write_text(json.dumps(index))
            source = name if index is None else folder
            model, info = super().from_pretrained(
                source, *model_args, config=config, output_loading_info=True, **kwargs
            )
        model.name_or_path = model.config.name_or_path = str(name)
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "device_map puts members on disk, which gives wrong features; load fewer with active_members=[...] or use a smaller dtype."
            )
        strict = ("members.", "projection.")
        missing = sorted(key for key in info["missing_keys"] if key.startswith(strict))
        unexpected = sorted(key for key in info["unexpected_keys"] if key.startswith(strict))
        # with ignore_mismatched_sizes a head may change; a member's would be left as uninitialised memory
        missing += sorted(key for key, *_ in info["mismatched_keys"] if key.startswith(strict))
        if missing or unexpected:
            raise ValueError(
                f"the weights in {name} do not fit its config: missing {_some(missing)}; unexpected {_some(unexpected)}."
            )
        for parameter in model.members.parameters():
            # Mapped files are not aligned, for which some CPU kernels sum in another order: RegNetY differs by 2e-7.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        push_to_hub=False,
        max_shard_size="50GB",
        variant=None,
        **kwargs,
    ):
        """As `PreTrainedModel.save_pretrained`, with one safetensors file per member (`member-00.safetensors`, ...),
        one for a head, the payload's code and the image processor. Stale shards of an earlier save are removed; with
        `active_members`, the numbers stay.

        Raises:
            ValueError: when only some members are built and the folder holds the weights of others, which would be
                lost; and after `fold_batchnorm()`.
            OSError: when the folder is a file, cannot be written, or holds a symbolic link.
        """
        self._check_not_folded("saved")
        folder = Path(save_directory)
        if folder.is_file():
            raise OSError(f"{folder} is a file; name a folder to save into.")
        if variant is not None:
            raise ValueError(f"variant={variant!r}: an ensemble has one set of weights per folder.")
        orphaned = (
            sorted(_members_on_disk(folder) - set(self.config.built_members)) if self.config.active_members else []
        )
        if orphaned:
            raise ValueError(
                f"{folder} holds the weights of members {orphaned}, which are not built here; save elsewhere, or the result of export_active()."
            )
        if is_main_process:
            refuse_links(folder)
            self.config.dtype, self.config.architectures = self.dtype, [type(self).__name__]
            self.config.save_pretrained(folder)
            ConcatEnsembleImageProcessor.from_config(self.config).save_pretrained(folder)  # copies the code, too
            _save_shards(self.state_dict() if state_dict is None else state_dict, folder, max_shard_size)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(
        self,
        repo_id,
        *,
        commit_message=None,
        commit_description=None,
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        max_shard_size="50GB",
    ) -> CommitInfo:
        """As `PreTrainedModel.push_to_hub`, in one commit with the image processor and the card. While the weights are
        those of the folder that the model was loaded from, that folder's card, results and figures go along; while they
        are those that the repo has, the repo's stay. Else a new card is written, where this package is installed.

        Raises:
            ValueError, OSError: as `push_folder`.
        """
        with tempfile.TemporaryDirectory() as name:
            folder, source = Path(name), Path(self.name_or_path)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            weights = [path.name for path in folder.glob("*.safetensors")]
            if source.is_dir() and not any(filecmp.cmpfiles(source, folder, weights, shallow=False)[1:]):
                for part in filter(Path.exists, map(source.joinpath, CARD_PARTS)):
                    (shutil.copytree if part.is_dir() else shutil.copy)(part, folder / part.name)
                if self.card_writer and not filecmp.cmp(
                    source / INDEX_NAME, folder / INDEX_NAME
                ):  # its head stays there
                    self.card_writer(folder, None)
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                card_writer=type(self).card_writer,
            )

    def export_active(self, members: list[int] | None = None) -> "ConcatEnsembleModel":
        """A whole ensemble of the built members, numbered from 0, without a head; it shares their weights.

        Args:
            members: Only these of the built ones, by their numbers, and in this order; a projection, which needs all in
                theirs, is left out.
        """
        chosen = self.config.built_members if members is None else list(members)
        config = ConcatEnsembleConfig(
            members=[self.config.members[k] for k in chosen],
            projection_dim=self.config.projection_dim if members is None else None,
            dtype=self.dtype,
        )
        with torch.device("meta"):
            ensemble = ConcatEnsembleModel(config)
        ensemble.members = nn.ModuleDict({str(n): self.members[str(k)] for n, k in enumerate(chosen)})
        ensemble.projection = self.projection if members is None else None
        return ensemble.train(self.training)


class ConcatEnsembleModel(ConcatEnsemblePreTrainedModel):
    """The concatenation of the members' pooled features.

    ```python
    >>> from transformers import AutoImageProcessor, AutoModel
    >>> model = AutoModel.from_pretrained(folder, trust_remote_code=True)  # doctest: +SKIP
    >>> processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)  # doctest: +SKIP
    >>> features = model(**processor(image)).pooler_output  # doctest: +SKIP

    ```
    """

    def __init__(self, config: ConcatEnsembleConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_member_features: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ConcatEnsembleModelOutput | tuple:
        """
        Args:
            pixel_values: (B, C, H, W), or (B, G, C, H, W) where members differ in geometry, from the image processor.
            output_member_features: Whether to return each member's features as well.
        """
        features = self.forward_members(pixel_values)
        output = ConcatEnsembleModelOutput(self.pool(features), features if output_member_features else None)
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class ConcatEnsembleForImageClassification(ConcatEnsemblePreTrainedModel):
    """The concatenation, optionally standardised with a stored mean and scale, and one linear layer on it: what a
    linear probe finds.
    """

    def __init__(self, config: ConcatEnsembleConfig):
        if config.active_members is not None:
            raise ValueError(
                "a head needs all members; load active_members=[...] with ConcatEnsembleModel, or export_active() first."
            )
        if not config.num_labels:
            raise ValueError(
                f"num_labels={config.num_labels}: a classifier needs classes; pass num_labels=10 or id2label={{0: 'cat', ...}}."
            )
        if config.num_labels * config.num_features > LARGEST_HEAD:
            raise ValueError(
                f"num_labels={config.num_labels} for {config.num_features:,} features: a head has up to {LARGEST_HEAD:,} weights."
            )
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.standardize:
            self.register_buffer("feature_mean", torch.zeros(config.num_features))
            self.register_buffer("feature_scale", torch.ones(config.num_features))
        self.classifier = nn.Linear(config.num_features, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_member_features: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ConcatEnsembleImageClassifierOutput | tuple:
        """
        Args:
            pixel_values: (B, C, H, W), or (B, G, C, H, W) where members differ in geometry, from the image processor.
            labels: (B,) int64 class numbers; floats for regression, (B, `num_labels`) floats for several labels an
                image.
            output_member_features: Whether to return each member's features as well.
        """
        features = self.forward_members(pixel_values)
        pooled = self.pool(features)
        inputs = (pooled - self.feature_mean) / self.feature_scale if self.config.standardize else pooled
        logits = self.classifier(inputs.to(self.classifier.weight.dtype))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ConcatEnsembleImageClassifierOutput(
            loss, logits, pooled, features if output_member_features else None
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self and self.config.standardize:
            init.zeros_(self.feature_mean)
            init.ones_(self.feature_scale)
        elif module is getattr(self, "classifier", None):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)


def _create_member(config: ConcatEnsembleConfig, k: int) -> nn.Module:
    spec = config.members[k]
    try:
        return create_backbone(spec["architecture"], **{key: _tuples(v) for key, v in spec["model_args"].items()})
    except ValueError as error:
        raise ValueError(f"members[{k}]: {error}") from error


def create_backbone(architecture: str, **model_args) -> nn.Module:
    """timm's network without a head, with fresh weights: built on the meta device first, where its size costs nothing.

    Raises:
        ValueError: when timm cannot build it, and when it is larger than any of timm's own.
    """

    def create():
        return timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)

    try:
        with torch.device("meta"), _bounded():
            network = create()
        return network if torch.get_default_device().type == "meta" else create()
    except Exception as error:  # of any kind: timm checks few of its arguments
        said = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) or not str(error) else str(error)
        raise ValueError(f"timm cannot build {architecture} with model_args {model_args}: {said}") from error


@contextmanager
def _bounded():
    """While this lasts, networks of more than `MOST_WEIGHTS` or `MOST_MODULES` end in a ValueError."""
    weights = modules = 0

    def count(module, name, value):
        nonlocal weights, modules
        weights += value.numel() if isinstance(value, torch.Tensor) else 0
        modules += isinstance(value, nn.Module)
        if weights > MOST_WEIGHTS or modules > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_WEIGHTS:,} weights or {MOST_MODULES:,} layers")

    with ExitStack() as hooks:
        for kind in ("parameter", "buffer", "module"):
            hook = getattr(registration, f"register_module_{kind}_registration_hook")(count)
            hooks.callback(hook.remove)
        yield


def _check_fit(config: ConcatEnsembleConfig, files: list[str], name) -> None:
    """transformers allocates what a config asks for before it sees that the files do not hold it."""
    with torch.device("meta"):
        model = ConcatEnsembleModel(config)
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    held = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            held |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 (no iteration over it)
    theirs = re.compile(rf"members\.({'|'.join(model.members)})\.|projection\.")
    missing = sorted(key for key, shape in wanted.items() if held.get(key) != shape)
    unexpected = sorted(key for key in held if key not in wanted and theirs.match(key))
    if missing or unexpected:
        raise ValueError(
            f"the weights in {name} do not fit its config: missing {_some(missing)}; unexpected {_some(unexpected)}."
        )


def _tuples(value):
    """Lists as tuples, which is what timm's own defaults are and JSON cannot hold."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _can_checkpoint(member: nn.Module) -> bool:
    """Whether timm can trade this member's memory for time; some have the method only to refuse."""
    try:
        member.set_grad_checkpointing(True)  # asked not to, even those that cannot agree
        member.set_grad_checkpointing(False)
        return True
    except (AssertionError, AttributeError, NotImplementedError):
        return False


def _pixels_of_member(config: ConcatEnsembleConfig, k: int):
    """A function from `pixel_values` to what member `k` sees: its slice, normalised by its own mean and std (exact:
    both are affine).
    """
    target, number = config.members[k]["preprocessing"], config.geometry_of(k)
    source, several = config.geometries[number], len(config.geometries) > 1
    same = source["mean"] == target["mean"] and source["std"] == target["std"]
    scale = [s / t for s, t in zip(source["std"], target["std"], strict=True)]
    shift = [(m - n) / t for m, n, t in zip(source["mean"], target["mean"], target["std"], strict=True)]
    return functools.partial(
        _take_pixels, number if several else None, target["input_size"], None if same else (scale, shift)
    )


def _take_pixels(number, size, affine, pixel_values: torch.Tensor) -> torch.Tensor:
    channels, height, width = size
    pixels = pixel_values if number is None else pixel_values[:, number, :channels, :height, :width]
    if affine is None:
        return pixels
    scale, shift = affine
    return pixels * pixels.new_tensor(scale)[:, None, None] + pixels.new_tensor(shift)[:, None, None]


class _FoldedBatchNorm(nn.Sequential):
    """What a BatchNorm leaves behind when it is folded: timm's may hold a dropout and an activation."""


class _Recording(TorchFunctionMode):
    """What a forward pass does: which weight convolves into a BatchNorm, and how often each tensor is used. Seen from
    the functions and not from the modules, since some modules convolve with other weights than they hold.
    """

    def __init__(self):
        super().__init__()
        self.convolved, self.normalised, self.uses, self.kept = {}, {}, Counter(), []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, int | torch.Size):  # asking for a shape is no use
            return result
        for value in (*args, *(kwargs or {}).values()):
            self.uses.update(map(id, value if isinstance(value, list | tuple) else [value]))
        if function in (functional.conv1d, functional.conv2d, functional.conv3d):
            self.convolved[id(result)] = id(args[1])
        elif function is functional.batch_norm:
            self.normalised[id(args[1])] = id(args[0])
        self.kept.append((args, kwargs, result))  # an id is a tensor's own only while the tensor lives
        return result


def _folded(member: nn.Module, pixels: torch.Tensor) -> nn.Module:
    """A copy of `member` with its BatchNorms folded where one image shows that it can be; itself where none can."""
    if not any(getattr(module, "running_mean", None) is not None for module in member.modules()):
        return member
    weight = next(member.parameters())
    precise = torch.promote_types(weight.dtype, torch.float32)  # rounded once, after folding
    folded = copy.deepcopy(member).to(precise)
    pixels = pixels.to(weight.device, precise)
    with _Recording() as seen:
        wanted = folded(pixels)
    convs = {
        id(module.weight): module
        for module in folded.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    pairs = []
    for name, norm in folded.named_modules():
        statistics = id(getattr(norm, "running_mean", None))
        between = seen.normalised.get(statistics)
        kernel = seen.convolved.get(between)
        if kernel in convs and seen.uses[statistics] == seen.uses[between] == seen.uses[kernel] == 1:
            pairs.append((name, norm, convs[kernel]))
    for name, norm, conv in pairs:
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
        folded.set_submodule(name, _FoldedBatchNorm(*rest).eval())
    if not torch.dist(folded(pixels), wanted) <= 1e-2 * wanted.norm():  # TF32's rounding is well within it
        raise ValueError("its features change when BatchNorm is folded; use it as it is.")
    return folded.to(weight.dtype) if pairs else member


def push_folder(
    folder,
    repo_id,
    *,
    commit_message=None,
    commit_description=None,
    private=None,
    token=None,
    revision=None,
    create_pr=False,
    card_writer=None,
) -> CommitInfo:
    """Make a Hub repo hold an ensemble's folder, by one commit or none. What the repo has already is not sent again, so
    an upload that was cut off goes on with the files that are missing. Weights that the folder does not have are
    removed in the same commit, and results and figures where it has a card; the repo's other files stay.

    Args:
        folder: As `save_pretrained` leaves it, with a card, results and figures or without. Hidden files stay behind.
        repo_id: `namespace/name`; made where there is none.
        private: Make the repo so. `revision`: A branch, made where there is none. `create_pr`: As a pull request.
        card_writer: Called with the folder and `repo_id` where the folder has no card and its weights are new there.

    Returns:
        The commit: the last one where nothing changed.

    Raises:
        ValueError: for arguments that do not go together, and before anything is made public that was to be private.
        OSError: for an incomplete folder, a symbolic link in it, a repo that somebody else has changed meanwhile, and
            the client's own where it is refused or cannot reach the Hub.
    """
    folder = Path(folder)
    if create_pr and revision is not None:
        raise ValueError(f"a pull request is made against main; leave out revision={revision!r} or create_pr.")
    given = token if isinstance(token, str) else None if token is False else get_token()
    if given and not re.fullmatch(r"[!-~]+", given):  # the client would print it in its error
        raise ValueError(
            "the token holds characters that tokens have not; copy it again, or log in with hf auth login."
        )
    files = _files_to_push(folder)
    api = HfApi(token=token, library_name="concat-ensemble")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is public already, and private was asked for; make it so on the Hub or leave it out."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = api.model_info(repo_id, revision=revision).sha
        remote = [
            file for file in api.list_repo_tree(repo_id, recursive=True, revision=parent) if isinstance(file, RepoFile)
        ]
        there = {file.path: file.lfs.sha256 for file in remote if file.lfs and SHARD_NAME.fullmatch(file.path)}
        additions = {name: CommitOperationAdd(name, path) for name, path in files.items()}
        weights = {
            name: file.upload_info.sha256.hex() for name, file in additions.items() if SHARD_NAME.fullmatch(name)
        }
        if card_writer and "README.md" not in files and weights != there:
            if "README.md" in {file.path for file in remote}:  # what was written by hand there is kept
                shutil.copy(api.hf_hub_download(repo_id, "README.md", revision=parent), folder / "README.md")
            card_writer(folder, repo_id)
            files = _files_to_push(folder)
            additions |= {
                name: CommitOperationAdd(name, path) for name, path in files.items() if name not in additions
            }
        changed = [file for name, file in additions.items() if name not in weights or weights[name] != there.get(name)]
        owned = CARD_PARTS[2:] if "README.md" in files else ()
        stale = [
            file.path
            for file in remote
            if file.path not in files and (SHARD_NAME.fullmatch(file.path) or file.path.split("/")[0] in owned)
        ]
        return api.create_commit(
            repo_id,
            [*changed, *map(CommitOperationDelete, stale)],
            commit_message=commit_message or "Upload ensemble",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except HfHubHTTPError:
        raise
    except (HTTPError, RuntimeError) as error:
        raise OSError(f"{repo_id}: {error} Push again: what has arrived is not sent a second time.") from error


def _files_to_push(folder: Path) -> dict[str, Path]:
    """The path of each file by its name in the repo."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") and part not in CARD_PARTS for part in name.parts)
        if hidden or path.suffix == ".tmp":
            continue
        if path.is_symlink():
            raise OSError(f"{path} is a link, and what it points to would be published; put the file in its place.")
        if path.is_file():
            files[name.as_posix()] = path
    try:
        shards = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise OSError(
            f"{folder} holds no whole ensemble ({INDEX_NAME}: {error!r}); save or build it again."
        ) from error
    missing = sorted({"config.json", "preprocessor_config.json", *shards} - set(files))
    if missing:
        raise OSError(f"{folder} lacks {', '.join(missing)}; save or build the ensemble again.")
    return files


def _wants_dict(return_dict: bool | None, config: ConcatEnsembleConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "nothing"


def _members_on_disk(folder: Path) -> set[int]:
    matches = (SHARD_NAME.fullmatch(path.name) for path in folder.glob("member-*.safetensors"))
    return {int(match["member"]) for match in matches if match}


def _index_of_members(
    cls, name, wanted: list[int] | None, projected: bool, hub: dict
) -> tuple[dict | None, list[str]]:
    """The checkpoint's index cut down to the shards that `cls` needs, with absolute paths, since transformers fetches
    every shard that an index names; None where it needs all of them or there is no index (a single
    `model.safetensors`). And the files that are needed, each seen to be whole."""
    quiet = {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(name, "model.safetensors", **hub, **quiet)
    if single is not None:
        _check_whole(single)
        return None, [single]
    path = cached_file(name, INDEX_NAME, **hub, **quiet)
    if path is None:
        return None, []
    try:
        index = json.loads(Path(path).read_text())
        unsafe = sorted(shard for shard in set(index["weight_map"].values()) if not SAFE_NAME.fullmatch(shard))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise OSError(f"{path} is not an index of weights ({error!r}); fetch or save it again.") from error
    if unsafe:
        raise OSError(
            f"{name}: the index names {unsafe[0]!r}; a shard's name may hold letters, digits, '.', '_' and '-' only."
        )

    def needed(key: str) -> bool:
        member = re.match(r"members\.(\d+)\.", key)
        if member:
            return wanted is None or int(member[1]) in wanted
        return projected if key.startswith("projection.") else not issubclass(cls, ConcatEnsembleModel)

    shards = sorted({shard for key, shard in index["weight_map"].items() if needed(key)})
    if not shards:
        raise ValueError(
            f"{name} holds no weights of members {'any' if wanted is None else wanted}; give active_members=[...] that it has."
        )
    files = dict(zip(shards, cached_files(name, shards, **hub), strict=True))
    for file in files.values():
        _check_whole(file)
    if set(files) == set(index["weight_map"].values()):
        return None, list(files.values())
    weight_map = {key: os.path.abspath(files[shard]) for key, shard in index["weight_map"].items() if shard in files}
    return {"metadata": index.get("metadata", {}), "weight_map": weight_map}, list(files.values())


def _check_whole(file: str) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise OSError(f"{file} is not a whole safetensors file ({error}); fetch or save it again.") from error


def _save_shards(state_dict: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """One file per member and one for the rest, each written aside and renamed; then the index; then what an earlier
    save left is removed.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        member = re.match(r"members\.(\d+)\.", key)
        other = "projection" if key.startswith("projection.") else "head"
        groups.setdefault(f"member-{int(member[1]):02d}" if member else other, {})[key] = tensor
    weight_map = {}
    for stem, tensors in groups.items():
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        for file, keys in split.filename_to_tensors.items():
            save_file(
                {key: tensors[key].detach().cpu().contiguous() for key in keys},
                folder / f"{file}.tmp",
                metadata={"format": "pt"},
            )
            os.replace(folder / f"{file}.tmp", folder / file)
            weight_map |= dict.fromkeys(keys, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{INDEX_NAME}.tmp").write_text(json.dumps(index, indent=2) + "\n")
    os.replace(folder / f"{INDEX_NAME}.tmp", folder / INDEX_NAME)
    for path in folder.glob("*.safetensors"):
        if SHARD_NAME.fullmatch(path.name) and path.name not in weight_map.values():
            path.unlink()
