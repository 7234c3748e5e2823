"""Several timm backbones as one transformers model: the concatenation of their pooled features."""

import copy
import ctypes
import functools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import timm
import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.hub import cached_file

# transformers finds the other files of the payload by these lines.
from .configuration_concat_ensemble import HUB_ARGUMENTS, ConcatEnsembleConfig, error_prefix, refuse_links, require
from .image_processing_concat_ensemble import ConcatEnsembleImageProcessor
from .weights_concat_ensemble import check_savable, copy_card, holds_weights, list_saved_members, open_checkpoint
from .weights_concat_ensemble import refuse_misfit, replace_files, save_weights

# Bounds for what a stranger's config may ask for: above all of timm's networks, and below what takes long to build.
MAX_WEIGHTS, MAX_MODULES, MAX_HEAD = 10**10, 20_000, 2**28  # the last: of a head or a projection that may be new
MODULES_PER_MEMBER = 1_000  # on average, for ensembles that may have more than MAX_MODULES
MAX_UNSAVED = 2**29  # bytes beside weights, such as tables of relative positions; and once more the weights' bytes
MAX_SECONDS = 20  # for building all members without memory; the slowest of timm's networks takes 1.5
ADAPTER_CONFIG = "adapter_config.json"
Network = TypeVar("Network", bound=nn.Module)
SHARD_PATTERNS = ["member-*.safetensors", "projection*.safetensors", "head*.safetensors", "model*.safetensors"]


@dataclass
class ConcatEnsembleOutput(ModelOutput):
    """
    Args:
        loss: Scalar, from a model with a head and with `labels`. `logits`: (B, `num_labels`), with a head.
        pooler_output: (B, `config.num_features`), the built members' features side by side, or their projection.
        member_features: One (B, `num_features`) tensor per built member, with `output_member_features=True`.
        hidden_states: Feature maps (B, C, H, W) of the members' layers, with `output_hidden_states`: those of the
            first built member from its first layer to its last, then those of the next.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    member_features: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ConcatEnsemblePreTrainedModel(PreTrainedModel):
    """Holds the members, loads and saves them; the two classes below add what they return."""

    config: ConcatEnsembleConfig
    config_class = ConcatEnsembleConfig
    base_model_prefix = ""  # both classes hold the members directly, so a member's file is the same for both
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    model_tags = ["concat-ensemble", "timm"]  # noqa: RUF012 (as transformers has it)
    accepts_loss_kwargs = False
    _supports_sdpa = True  # timm's attention layers choose it themselves

    def __init__(self, config: ConcatEnsembleConfig):
        super().__init__(config)
        config.check_active_members()
        config.check_dynamic_img_size()
        if not config.members:
            raise ValueError("members is empty; an ensemble needs at least one: see concat_ensemble.assemble.")
        num_networks = len(config.built_members) * (3 if config.dynamic_img_size else 1)  # how many are tried
        self.members = _build_within_limits(functools.partial(_create_members, config), num_networks)
        self._member_pixels, geometries = {}, config.geometries
        for k in config.built_members:
            spec, index = config.members[k], config.geometry_index(k)
            number, shape = index if len(geometries) > 1 else None, geometries[index]
            # A partial, not a closure, since models are pickled.
            self._member_pixels[str(k)] = functools.partial(_select_pixels, number, shape, spec["preprocessing"])
        self.mark_members()
        dim, width = config.projection_dim, config.num_member_features
        expected = f"smaller for {width:,} features: a projection has up to {MAX_HEAD:,} weights"
        require(dim is None or dim * width <= MAX_HEAD, "projection_dim", dim, expected)
        self.projection = None if dim is None else nn.Linear(width, dim)
        self.members_frozen = False
        self._pixel_shape = config.pixel_shape
        self.supports_gradient_checkpointing = any(map(_can_checkpoint, self.members.values()))
        # `device_map="auto"` places whole members: accelerate would separate views that timm's blocks share.
        self._no_split_modules = {type(member).__name__ for member in self.members.values()}
        inactive = [k for k in range(len(config.members)) if k not in config.built_members]
        self._keys_to_ignore_on_load_unexpected = {rf"^members\.{k}\." for k in inactive}

    def forward_members(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Each built member's pooled features, (B, `num_features`), from the processor's `pixel_values`. Raises
        ValueError for pixels of another shape than (B, *`config.pixel_shape`), unless `config.dynamic_img_size`."""
        return self._forward_members(pixel_values, layers=False)[0]

    def _forward_members(self, pixel_values: Tensor, layers: bool | list[int] | None) -> tuple[tuple, tuple | None]:
        """The members' pooled features and, if `layers` is not false, the feature maps of all or of these layers."""
        expected = self._pixel_shape
        if self.config.dynamic_img_size:
            expected = (expected[0], *pixel_values.shape[2:])
        if pixel_values.ndim != len(self._pixel_shape) + 1 or tuple(pixel_values.shape[1:]) != expected:
            shape = f"(B, {', '.join(map(str, expected))}); use the ensemble's own image processor"
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)} must be of shape {shape}.")
        features, hidden_states = [], []
        for name, member in self.members.items():
            weight = next(member.parameters())
            pixels = self._member_pixels[name](pixel_values.to(weight.device, weight.dtype))
            with error_prefix(f"members[{name}]"):
                pooled, maps = _forward_member(member, pixels, layers)
            width = self.config.members[int(name)]["num_features"]
            if pooled.ndim != 2 or pooled.shape[1] != width:
                shape = tuple(pooled.shape)
                raise ValueError(f"members[{name}] returns shape {shape}; its config promises pooled (B, {width}).")
            features.append(pooled.to(pixel_values.device))
            hidden_states += [each.to(pixel_values.device) for each in maps]
        return tuple(features), tuple(hidden_states) if layers else None

    def _forward(
        self, pixel_values: Tensor, output_member_features: bool, output_hidden_states: bool | list[int] | None
    ) -> ConcatEnsembleOutput:
        """What both classes return."""
        layers = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features, hidden_states = self._forward_members(pixel_values, layers)
        return ConcatEnsembleOutput(
            pooler_output=self.pool(features),
            member_features=features if output_member_features else None,
            hidden_states=hidden_states,
        )

    def pool(self, features: tuple[Tensor, ...]) -> Tensor:
        """(B, `config.num_features`): the members' features side by side, projected if there is a projection."""
        pooled = torch.cat(features, dim=1)
        return pooled if self.projection is None else self.projection(pooled.to(self.projection.weight.dtype))

    def freeze_members(self, frozen: bool = True) -> None:
        """Stop training the members, or resume it with `frozen=False`. Frozen members stay in evaluation mode whatever
        `train()` says: with `requires_grad=False` alone, BatchNorm's statistics would still move."""
        self.members_frozen = frozen
        self.members.requires_grad_(not frozen)
        self.train(self.training)

    def fold_batchnorm(self) -> "ConcatEnsemblePreTrainedModel":
        """Fold BatchNorm into the convolutions, in place: see `concat_ensemble.inference.folding`, which does it."""
        remedy = "pip install concat-ensemble, then call concat_ensemble.inference.folding.fold_batchnorm(model)"
        raise RuntimeError(f"fold_batchnorm() needs the package; {remedy}.")

    def _check_not_folded(self, action: str) -> None:
        if any(getattr(module, "is_folded_batchnorm", False) for module in self.members.modules()):
            raise ValueError(f"a model after fold_batchnorm() cannot be {action}; load or assemble it again for that.")

    def train(self, mode: bool = True):
        if mode:
            self._check_not_folded("trained")
        super().train(mode)
        for module in self.members.modules() if mode else ():
            # Without this, training an adapter would move the statistics of layers that it leaves alone.
            weight = getattr(module, "weight", None)
            if hasattr(module, "running_mean") and weight is not None and not weight.requires_grad:
                module.eval()
        if self.members_frozen:
            self.members.eval()
        return self

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Beside transformers' own, which come from a class attribute and a field of the config: the first name of each
        # weight by its other names, since some of timm's networks, such as CoaT, reuse layers.
        first = {}
        named_weights = self.named_parameters(remove_duplicate=False)
        sources = {name: first.setdefault(id(weight), name) for name, weight in named_weights}
        shared = {name: source for name, source in sources.items() if name != source}
        return super().get_expanded_tied_weights_keys(all_submodels) | shared

    def mark_tied_weights_as_initialized(self, loading_info):
        # transformers' own marks tied weights before it looks which are missing, so that none would be missed. Here
        # whole layers are shared: a weight that was loaded under one name has its mark under all of them.
        keys, mark = loading_info.missing_keys, "_is_hf_initialized"
        loading_info.missing_keys = {k for k in keys if not getattr(self.get_parameter_or_buffer(k), mark, False)}

    def get_input_embeddings(self):
        return None  # images have none

    def set_input_embeddings(self, value):
        raise NotImplementedError("an ensemble takes images and has no token embeddings to set.")

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        for member in filter(_can_checkpoint, self.members.values()):
            member.set_grad_checkpointing(enable)

    def mark_members(self) -> None:
        for module in self.members.modules():
            if hasattr(module, "attention_bias_cache") and not hasattr(module, "is_of_member"):
                module.register_forward_pre_hook(_clear_attention_biases)
                module.register_forward_hook(_clear_attention_biases)
            module.is_of_member = True  # `_init_weights` leaves these alone

    @torch.no_grad()
    def _init_weights(self, module):
        # timm initializes its own weights when it builds a network. What is built without memory first has buffers of
        # uninitialized memory: in `from_pretrained` the non-persistent ones (transformers #48892), with which Swin
        # crashes and EVA02 is silently wrong, and otherwise BatchNorm's statistics as well.
        if not hasattr(module, "is_of_member"):
            super()._init_weights(module)
        elif hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif getattr(module, "running_mean", None) is not None:
            init.zeros_(module.running_mean)  # not where it was loaded: these functions look for transformers' mark
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As `PreTrainedModel.from_pretrained`, and strict: a missing or unexpected weight of a member raises. With
        `active_members=[...]`, only these members are built, and only their files read or fetched.

        Raises:
            ValueError: for missing, unexpected or misshapen weights of a member, before memory is allocated; for bad
                `active_members`; for a `device_map` that offloads to disk.
            OSError: for a file that is missing, broken, named outside the folder or not safetensors (pickles are read,
                tensors only, with `use_safetensors=False`).
        """
        return_info = kwargs.get("output_loading_info", False)
        kwargs = {"use_safetensors": True, **kwargs, "output_loading_info": True}
        hub_arguments = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        # transformers would look for an adapter where we let it load from, which may be a temporary folder.
        options = kwargs.pop("adapter_kwargs", None) or {}
        try:
            adapter, name, options = maybe_load_adapters(pretrained_model_name_or_path, hub_arguments, **options)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{pretrained_model_name_or_path} has an {ADAPTER_CONFIG} that is none of PEFT's ({error!r})"
            raise ValueError(f"{problem}; save the adapter again.") from error
        kwargs["adapter_kwargs"] = {**options, "_adapter_model_path": adapter}
        if adapter is not None and kwargs["use_safetensors"]:  # or transformers would read a pickle in its place
            places = hub_arguments | {key: options[key] for key in HUB_ARGUMENTS if key in options}
            cached_file(adapter, "adapter_model.safetensors", **places)
            _check_adapter_type(cached_file(adapter, ADAPTER_CONFIG, **places))
        config = name if config is None else config
        with torch.device("meta"):
            expected = ConcatEnsembleModel(_read_config(config, kwargs, hub_arguments)).state_dict(keep_vars=True)
        with_head = not issubclass(cls, ConcatEnsembleModel)
        options = {"allow_pickles": not kwargs["use_safetensors"]}
        with open_checkpoint(name, expected, with_head, hub_arguments, **options) as source:
            model, info = super().from_pretrained(source, *model_args, config=config, **kwargs)
        model.name_or_path = model.config.name_or_path = str(name)
        _check_loaded(model, info, name if adapter is None else adapter)
        for parameter in model.members.parameters():
            # Mapped files are not aligned, and then some CPU kernels sum in another order: RegNetY differs by 2e-7.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return (model, info) if return_info else model

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, max_shard_size="50GB", **kwargs
    ):
        """As `PreTrainedModel.save_pretrained`, with one safetensors file per member (`member-00.safetensors`, ...),
        one for a head, the payload's code and the image processor. Stale shards of an earlier save are removed; with
        `active_members`, the members keep their numbers.

        Raises:
            ValueError: after `fold_batchnorm()`, and if the folder has weights of members that are not built here.
            OSError: if the folder is a file, cannot be written, or holds a symbolic link.
        """
        self._check_not_folded("saved")
        folder, variant = Path(save_directory), kwargs.pop("variant", None)
        if folder.is_file():
            raise OSError(f"{folder} is a file; name a folder to save into.")
        require(variant is None, "variant", variant, "left out: an ensemble has one set of weights per folder")
        with_adapter = self._hf_peft_config_loaded
        own = self._list_weights(self.state_dict())
        weights = own if state_dict is None else self._list_weights(state_dict)
        refuse_misfit([key for key in own if key not in weights], [], "state_dict")
        with_base = not with_adapter or not self._find_base(folder, weights)
        if with_base:
            self._check_base(folder, weights)
        if is_main_process:
            refuse_links(folder)
            with replace_files(folder) as aside:
                if with_adapter:
                    super().save_pretrained(aside, state_dict=state_dict)
                if with_base:
                    self._save_base(weights, aside, max_shard_size)
                if with_base and with_adapter:
                    _keep_base_on_loading(aside / ADAPTER_CONFIG)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def _list_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights without those of adapters, by the names that they have without adapters, each tensor once.
        Raises ValueError for adapters that transformers does not know of."""
        wrappers = [f"{name}." for name, module in self.named_modules() if hasattr(type(module), "active_adapter")]
        if wrappers and not self._hf_peft_config_loaded:
            remedy = "save PEFT's own model, or its merge_and_unload()"
            raise ValueError(f"{type(self).__name__} has adapters of a model of PEFT, which would be lost; {remedy}.")
        wrappers.sort(key=len, reverse=True)  # the inner ones first
        named = {key: _name_without_adapters(key, wrappers) for key in state_dict}
        tied = self.all_tied_weights_keys
        return {name: state_dict[key] for key, name in named.items() if name and tied.get(name) not in state_dict}

    def _find_base(self, folder: Path, weights: dict[str, Tensor]) -> bool:
        """Whether `folder`, or where the model was loaded from, holds the weights that are not the adapter's."""
        if getattr(self, "hf_quantizer", None) is not None:
            return True  # quantized weights are not trained
        commit = getattr(self.config, "_commit_hash", None)
        return holds_weights(folder, None, weights) or holds_weights(self.name_or_path, commit, weights)

    def _check_base(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Raise ValueError for weights that could not be loaded, and for a folder whose files do not go with them."""
        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            expected = ConcatEnsembleModel(config).state_dict(keep_vars=True)
        check_savable(weights, expected, f"this {type(self).__name__}")
        saved = list_saved_members(folder)
        others = sorted(saved - set(config.built_members))
        if others and config.active_members:
            remedy = "save elsewhere, or save the result of export_active()"
            raise ValueError(f"{folder} holds the weights of members {others}, which are not built here; {remedy}.")
        if self._hf_peft_config_loaded and saved:
            problem = f"{folder} holds other weights than those that the adapter was trained with"
            raise ValueError(f"{problem}; save elsewhere, or call freeze_members() before the adapter is added.")
        if not self._hf_peft_config_loaded and Path(folder, ADAPTER_CONFIG).is_file():
            raise ValueError(f"{folder} holds an adapter, which would be loaded with these weights; save elsewhere.")

    def _save_base(self, weights: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
        config = copy.deepcopy(self.config)
        config.dtype, config.architectures = self.dtype, [type(self).__name__]
        config.save_pretrained(folder)
        ConcatEnsembleImageProcessor.from_config(config).save_pretrained(folder)  # copies the code, too
        save_weights(weights, folder, max_shard_size)

    def push_to_hub(
        self, repo_id, *, private=None, token=None, revision=None, max_shard_size="50GB", **commit
    ) -> CommitInfo:
        """As `PreTrainedModel.push_to_hub`, with the image processor and the card. While the weights are those of the
        folder that the model was loaded from, that folder's card, results and figures go along; else the repo's card
        stays or, with the package installed, a new one is written if the repo has other weights. `commit` may hold
        `commit_message`, `commit_description` and `create_pr`.

        Raises:
            ValueError: for arguments that do not go together, and with `private=True` for a repo that is public.
            OSError: if the Hub refuses the upload or cannot be reached.
        """
        # Not transformers' own method, which would replace the card by a generated one.
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_exposed = private and not api.model_info(repo_id).private
        require(not is_exposed, "private", private, f"left out: {repo_id} is public; or make it private on the Hub")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            copy_card(Path(str(self.name_or_path)), Path(folder))
            options = {"revision": revision, "delete_patterns": SHARD_PATTERNS, "commit_message": "Upload ensemble"}
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options | commit)

    def export_active(self, members: list[int] | None = None) -> "ConcatEnsembleModel":
        """A whole ensemble of the built members, or of those with these numbers, in this order. It numbers them from 0
        and shares their weights. It has no head, and with `members` no projection either, which needs all of them."""
        chosen = self.config.built_members if members is None else list(members)
        config = ConcatEnsembleConfig(
            members=[self.config.members[k] for k in chosen],
            projection_dim=self.config.projection_dim if members is None else None,
            dynamic_img_size=self.config.dynamic_img_size,
            dtype=self.dtype,
        )
        with torch.device("meta"):
            ensemble = ConcatEnsembleModel(config)
        ensemble.members = nn.ModuleDict({str(n): self.members[str(k)] for n, k in enumerate(chosen)})
        ensemble.projection = self.projection if members is None else None
        return ensemble.train(self.training)


class ConcatEnsembleModel(ConcatEnsemblePreTrainedModel):
    """The concatenation of the members' pooled features."""

    def __init__(self, config: ConcatEnsembleConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_member_features: bool = False,
        output_hidden_states: bool | list[int] | None = None,
        **kwargs,
    ) -> ConcatEnsembleOutput:
        """
        Args:
            pixel_values: (B, C, H, W), or (B, G, C, H, W) if members differ in geometry, from the image processor.
            output_member_features: Whether to return each member's features as well.
            output_hidden_states: Whether to return the members' feature maps, by default as the config says. A list of
                layers, such as `[-1]`, selects these of each member. ValueError for a member that has none.
        """
        return self._forward(pixel_values, output_member_features, output_hidden_states)


class ConcatEnsembleForImageClassification(ConcatEnsemblePreTrainedModel):
    """The concatenation, optionally standardized with a stored mean and scale, and one linear layer on it, such as a
    linear probe finds."""

    def __init__(self, config: ConcatEnsembleConfig):
        active, num_labels = config.active_members, config.num_labels or 0
        expected = "None for a head; load some members with ConcatEnsembleModel, or export_active() first"
        require(active is None, "active_members", active, expected)
        expected = "above 0, since a classifier needs classes; pass num_labels=10 or id2label={0: 'cat', ...}"
        require(bool(num_labels), "num_labels", num_labels, expected)
        expected = f"smaller for {config.num_features:,} features: a head has up to {MAX_HEAD:,} weights"
        require(num_labels * config.num_features <= MAX_HEAD, "num_labels", num_labels, expected)
        super().__init__(config)
        self.num_labels = num_labels
        if config.standardize:
            self.register_buffer("feature_mean", torch.zeros(config.num_features))
            self.register_buffer("feature_scale", torch.ones(config.num_features))
        self.classifier = nn.Linear(config.num_features, num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_member_features: bool = False,
        output_hidden_states: bool | list[int] | None = None,
        **kwargs,
    ) -> ConcatEnsembleOutput:
        """As `ConcatEnsembleModel.forward`, with `labels`: (B,) int64 class numbers, (B,) floats for regression, or
        (B, `num_labels`) floats for several labels an image."""
        output = self._forward(pixel_values, output_member_features, output_hidden_states)
        pooled = output.pooler_output
        inputs = (pooled - self.feature_mean) / self.feature_scale if self.config.standardize else pooled
        logits = self.classifier(inputs.to(self.classifier.weight.dtype))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ConcatEnsembleOutput(loss, logits, pooled, output.member_features, output.hidden_states)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self and self.config.standardize:
            init.zeros_(self.feature_mean)
            init.ones_(self.feature_scale)
        elif module is getattr(self, "classifier", None):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)


def _read_config(config, overrides: dict, hub_arguments: dict) -> ConcatEnsembleConfig:
    """What decides which weights are needed. `config` may say where to read it; transformers reads it again later."""
    if isinstance(config, PreTrainedConfig):
        return config
    settings = ConcatEnsembleConfig.get_config_dict(config, **hub_arguments)[0] | overrides
    fields = ("members", "active_members", "projection_dim")
    return ConcatEnsembleConfig(**{name: settings[name] for name in fields if name in settings})


def _check_loaded(model: ConcatEnsemblePreTrainedModel, info: dict, name) -> None:
    """Raise ValueError unless exactly the weights of the members and the projection were loaded."""
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        remedy = "load fewer with active_members=[...] or use a smaller dtype"
        raise ValueError(f"device_map puts members on disk, which gives wrong features; {remedy}.")
    # With ignore_mismatched_sizes a head may change; a member's weight would be left as uninitialized memory.
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    both, parts = (missing, info["unexpected_keys"]), ("members.", "projection.")
    refuse_misfit(*([key for key in keys if key.startswith(parts)] for keys in both), name)


def create_backbone(architecture: str, **model_args) -> nn.Module:
    """timm's network without a head, with fresh weights, built on the meta device first, where its size costs nothing.
    Raises ValueError when timm cannot build it, and when it is larger than any of timm's own."""
    return _build_within_limits(functools.partial(_create_network, architecture, model_args))


def _build_within_limits(create: Callable[[], Network], num_networks: int = 1) -> Network:
    """What `create` builds on the default device. It is called on the meta device first, where sizes cost nothing.
    Raises ValueError if it takes more there than the bounds above for so many networks."""
    with torch.device("meta"), _Limits(num_networks) as limits, _deadline(limits.remaining_seconds):
        built = create()
    if torch.get_default_device().type == "meta":
        return built
    del built
    return create()


class _Limits(TorchDispatchMode):
    """Raises ValueError as soon as networks that are built inside, on the meta device, exceed the bounds above. Layers
    and weights count when they are registered, and the memory of all tensors while they are alive."""

    def __init__(self, num_networks: int):
        super().__init__()
        self.max_weights = MAX_WEIGHTS * num_networks
        self.max_modules = max(MAX_MODULES, MODULES_PER_MEMBER * num_networks)
        self.modules = self.weights = self.weight_bytes = 0
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.alive_bytes = self.checked = 0

    def __enter__(self):
        self.thread, self.started = threading.get_ident(), (time.process_time(), time.monotonic())
        self.hooks = [
            registration.register_module_module_registration_hook(self._count_module),
            registration.register_module_parameter_registration_hook(self._count_weights),
        ]
        return super().__enter__()

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        for hook in self.hooks:
            hook.remove()
        if kind is None:
            self._check()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._check()  # without the last tensor, which may have become a weight
        result = function(*args, **(kwargs or {}))
        if all(output.alias_info is None for output in function._schema.returns):  # it is new, and no view
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    self.alive.append((StorageWeakRef(storage), storage.nbytes()))
                    self.alive_bytes += storage.nbytes()
        return result

    def _count_module(self, module, name, value):
        if threading.get_ident() == self.thread:
            self.modules += 1
            self._check()

    def _count_weights(self, module, name, value):
        if threading.get_ident() == self.thread and value is not None:
            self.weights += value.numel()
            self.weight_bytes += value.nbytes
            self._check()

    def _check(self):
        if self.weights > self.max_weights or self.modules > self.max_modules:
            raise ValueError(f"it has more than {self.max_weights:,} weights or {self.max_modules:,} layers")
        max_bytes = MAX_UNSAVED + 2 * self.weight_bytes
        if self.alive_bytes > max_bytes or len(self.alive) > self.checked + 10_000:
            self.alive = [(reference, size) for reference, size in self.alive if not reference.expired()]
            self.alive_bytes, self.checked = sum(size for _, size in self.alive), len(self.alive)
        if self.alive_bytes > max_bytes:
            raise ValueError(f"its buffers take over {MAX_UNSAVED >> 20} MiB more than its weights")
        if self.remaining_seconds() <= 0:
            raise _TooSlow()

    def remaining_seconds(self) -> float:
        # The clock also runs while a busy machine does other things, and the processor's time while other threads run.
        now = time.process_time(), time.monotonic()
        return MAX_SECONDS - min(end - start for start, end in zip(self.started, now, strict=True))


class _TooSlow(ValueError):
    def __init__(self):
        super().__init__(f"it takes more than {MAX_SECONDS} seconds")


@contextmanager
def _deadline(remaining_seconds: Callable[[], float]):
    """Raise ValueError when no seconds remain. Some constructors loop in Python for hours and call nothing in which
    `_Limits` could stop them, so another thread does it."""
    thread, lock, is_over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()

    def interrupt():
        while (seconds := remaining_seconds()) > 0:
            if is_over.wait(seconds):
                return
        with lock:
            if not is_over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TooSlow))

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        yield
    finally:
        with lock:  # what has been sent is raised by the next call, so that nothing is to be taken back
            is_over.set()


def _create_members(config: ConcatEnsembleConfig) -> nn.ModuleDict:
    members = nn.ModuleDict()
    for k in config.built_members:
        spec = config.members[k]
        with error_prefix(f"members[{k}]"):
            if config.dynamic_img_size:
                members[str(k)] = _create_dynamic_network(spec)
            else:
                members[str(k)] = _create_network(spec["architecture"], spec["model_args"])
    return members


def _create_network(architecture: str, model_args: dict) -> nn.Module:
    arguments = {name: _as_tuples(value) for name, value in model_args.items()}
    dtype = torch.get_default_dtype()  # that of `from_pretrained(dtype=...)`; some of timm's layers do not look there
    arguments |= {} if dtype == torch.float32 else {"dtype": dtype}
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    except Exception as error:  # timm checks few of its arguments, so any kind of error may come
        reason = repr(error) if isinstance(error, LookupError) or not str(error) else str(error)
        arguments = str(model_args)[:300]
        raise ValueError(f"timm cannot build {architecture} with model_args {arguments}: {reason}") from error


def _create_dynamic_network(spec: dict) -> nn.Module:
    """A member that takes images of other sizes than its own: with timm's argument where it has it, else if it does by
    itself. Raises ValueError if images twice as high and twice as wide cannot be run on the meta device."""
    architecture, (channels, height, width) = spec["architecture"], spec["preprocessing"]["input_size"]
    for arguments in ({**spec["model_args"], "dynamic_img_size": True}, spec["model_args"]):
        try:
            with torch.device("meta"):
                network = _create_network(architecture, arguments).eval()
            with torch.device("meta"), _disable_current_modes():  # feature maps do not count
                for size in ((2 * height, width), (height, 2 * width)):
                    network(torch.zeros(1, channels, *size))
        except Exception as error:  # of any kind, for a network that cannot
            reason = str(error)
        else:
            return _create_network(architecture, arguments)
    problem = f"dynamic_img_size=True must be left out: timm's {architecture} takes images of {height}x{width} alone"
    raise ValueError(f"{problem} ({reason}).")


def _check_adapter_type(adapter_config: str) -> None:
    """Raise ValueError for a kind of adapter that PEFT does not know, for which PEFT raises KeyError."""
    from peft import PeftType

    peft_type = json.loads(Path(adapter_config).read_text()).get("peft_type")
    require(peft_type in list(PeftType), "peft_type", peft_type, f"one of those of PEFT in {adapter_config}")


def _keep_base_on_loading(adapter_config: Path) -> None:
    """PiSSA and others change the base when an adapter is made. Saved as it is then, it must not be changed again."""
    settings = json.loads(adapter_config.read_text())
    if isinstance(settings.get("init_lora_weights"), str):
        adapter_config.write_text(json.dumps(settings | {"init_lora_weights": True}, indent=2, sort_keys=True) + "\n")


def _name_without_adapters(key: str, wrappers: list[str]) -> str | None:
    """A weight's name before PEFT wrapped the layers with these names, or None for a weight that PEFT added."""
    for wrapper in wrappers:
        if key.startswith(wrapper):
            layer, _, rest = key.removeprefix(wrapper).partition(".")
            if layer not in ("base_layer", "original_module"):
                return None
            key = wrapper + rest
    return key


def _as_tuples(value):
    """Lists as tuples, which timm's own defaults are and JSON cannot hold."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _clear_attention_biases(module: nn.Module, *_) -> None:
    """Before and after a forward pass with gradients, forget what timm keeps in evaluation mode: one kept without a
    gradient would have none, and one with a gradient could neither be used twice nor copied."""
    if torch.is_grad_enabled():
        module.attention_bias_cache = {}


def _can_checkpoint(member: nn.Module) -> bool:
    """Whether timm can trade this member's memory for time; some have the method only to refuse."""
    try:
        member.set_grad_checkpointing(True)  # those that refuse do not refuse False
        member.set_grad_checkpointing(False)
        return True
    except (AssertionError, AttributeError, NotImplementedError):
        return False


def _forward_member(
    member: nn.Module, pixels: Tensor, layers: bool | list[int] | None
) -> tuple[Tensor, Iterable[Tensor]]:
    """A member's pooled features and, if `layers` is not false, the feature maps of all or of these layers. Raises
    ValueError for layers and for sizes of images that it does not take."""
    kind, size = type(member).__name__, "x".join(map(str, pixels.shape[2:]))
    if layers and not hasattr(member, "forward_intermediates"):
        raise ValueError(
            f"timm's {kind} does not return the feature maps of its layers; leave out output_hidden_states."
        )
    try:
        if not layers:
            return member(pixels), ()
        final, maps = member.forward_intermediates(pixels, indices=None if layers is True else list(layers))
        return member.forward_head(final), maps
    except AssertionError as error:
        problem = f"timm's {kind} refuses output_hidden_states={layers} or images of {size} pixels"
        raise ValueError(f"{problem} ({error}); choose others.") from error


def _select_pixels(index: int | None, source: dict, target: dict, pixel_values: Tensor) -> Tensor:
    """What a member with the preprocessing `target` sees: its channels of slice `index` (None if there is only one) of
    its geometry, normalized by its own mean and std in place of those of `source` (exact: both are affine)."""
    channels, height, width = target["input_size"]
    pixels = pixel_values if index is None else pixel_values[:, index, :, :height, :width]
    places = list(range(channels))
    if source.get("channels") != target.get("channels"):
        places = [source["channels"].index(number) for number in target["channels"]]
    pixels = pixels[:, :channels] if places == list(range(channels)) else pixels[:, places]
    mean, std = ([source[key][place] for place in places] for key in ("mean", "std"))
    if mean == target["mean"] and std == target["std"]:
        return pixels
    scale = [s / t for s, t in zip(std, target["std"], strict=True)]
    shift = [(m - n) / t for m, n, t in zip(mean, target["mean"], target["std"], strict=True)]
    return pixels * pixels.new_tensor(scale)[:, None, None] + pixels.new_tensor(shift)[:, None, None]
