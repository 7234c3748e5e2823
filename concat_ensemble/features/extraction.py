"""Features of frozen members: each image goes through each member once, and later tables read the stored rows."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from concat_ensemble.data.images import describe_image, read_image
from concat_ensemble.data.labels import class_names, read_groups, read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.features.extractor import Extractor, PooledFeatures
from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.ntk import NTK, NTKFeatures
from concat_ensemble.features.projection import stored_projection
from concat_ensemble.features.store import Block, block_key, default_store, image_hashes
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble, is_ensemble
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor, convert_image

SHARD_IMAGES = 512  # images in a file; the most that a kill loses
STORAGE = {"float32": torch.float32, "float16": torch.float16}

Places = dict[bytes, tuple[str, int]]  # image hash -> (split, row) of its first copy, in the order of the dataset


def extract_features(
    model: nn.Module,
    dataset: DatasetDict | Dataset,
    processor: BaseImageProcessor | None = None,
    *,
    ntk: NTK | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    compute: torch.dtype = torch.float32,
    storage: str = "float32",
    store: Path | None = None,
    quiet: bool = False,
) -> FeatureTable:
    """Features of a frozen model for all images of a dataset. Only what is not stored yet is extracted.

    The members' own features are stored; a projection is applied when the table is read. All missing members run in
    one pass over the images. Under `accelerate launch` the processes share the images. A kill loses at most
    `SHARD_IMAGES` images; a second process that needs the same features waits for the first.

    Args:
        model: An ensemble; or, for a table of one block, a timm model or a transformers model with a `pooler_output`.
        dataset: From `load_data`. Any other dataset is passed through `load_data` with its defaults.
        processor: Makes `pixel_values` from a list of PIL images. Default: the model's own.
        ntk: Store gradients with these settings in place of pooled features.
        device: Where the model runs. Default: the GPU if there is one, else the CPU.
        compute: float32, or bfloat16 for autocast. Each precision has blocks of its own.
        storage: "float32", or "float16" for half the disk space.
        store: Folder of the stored features. Default: one in `HF_ASSETS_CACHE`.
        quiet: Show no progress bar. Without a terminal none is shown either.

    Raises:
        ValueError: naming an image that cannot be read, or one for which a member gives NaN, infinite, or (in float16)
            too large features.
        OSError: if the disk is full; what was extracted before is kept.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage={storage!r} must be {' or '.join(STORAGE)}.")
    if ntk and compute != torch.float32:
        raise ValueError(f"compute={compute}: gradients per image need torch.float32.")
    if not _is_loaded(dataset):
        dataset = load_data(dataset)
    splits = {str(name): rows for name, rows in dataset.items()}
    network = _to_transformers(model)
    extractor = NTKFeatures(ntk, network) if ntk else PooledFeatures()
    settings = {"compute": str(compute), "storage": str(STORAGE[storage])}
    names = block_names(network, processor, extractor, settings)
    blocks = [Block((store or default_store()) / key, architecture) for key, architecture in names]
    hashes = {split: image_hashes(rows) for split, rows in splits.items()}
    run = _Run(
        model=network,
        processor=processor,
        extractor=extractor,
        blocks=blocks,
        splits=splits,
        places=_first_places(hashes),
        batch_size=batch_size,
        num_workers=num_workers,
        device=_choose_device(device),
        compute=compute,
        storage=STORAGE[storage],
        quiet=quiet,
    )
    started = time.perf_counter()
    extracted = run.extract_missing()
    seconds = time.perf_counter() - started
    table = FeatureTable(
        {split: [block.rows(hashes[split]) for block in blocks] for split in splits},
        {split: read_labels(rows) for split, rows in splits.items()},
        class_names(next(iter(splits.values()))),
        tuple(key for key, _ in names),
        extracted,
        extracted / seconds if extracted else None,
        read_groups(splits),
    )
    if extractor.uses_projection and is_ensemble(network) and network.projection is not None:
        return stored_projection(network.projection)(table)
    return table


def block_names(
    model: PreTrainedModel, processor: BaseImageProcessor | None, extractor: Extractor, settings: dict[str, str]
) -> list[tuple[str, str]]:
    """(key, architecture) of each built member's block; `settings` are the dtypes, which are part of the key."""
    shared = settings | {"processor": None if processor is None else processor.to_dict()}
    if not is_ensemble(model):
        key = block_key(model, {"config": model.config.to_dict()} | shared | extractor.key_fields(0))
        return [(key, type(model).__name__ + extractor.name_suffix)]
    names = []
    for position, (number, member) in enumerate(model.members.items()):
        config = model.config.members[int(number)]
        own = {field: config[field] for field in ("architecture", "model_args", "preprocessing")}
        key = block_key(member, own | shared | extractor.key_fields(position))
        names.append((key, config["architecture"] + extractor.name_suffix))
    return names


def plan_passes(missing: Sequence[set[bytes]], images: Iterable[bytes]) -> dict[tuple[int, ...], list[bytes]]:
    """Positions of members -> the images that exactly these members miss, in the order of `images`."""
    passes: dict[tuple[int, ...], list[bytes]] = {}
    for image in images:
        positions = tuple(position for position, own in enumerate(missing) if image in own)
        if positions:
            passes.setdefault(positions, []).append(image)
    return passes


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Runs the members on the images that their blocks miss: plans the passes, then writes shard after shard."""

    model: PreTrainedModel
    processor: BaseImageProcessor | None  # None: the model's own
    extractor: Extractor
    blocks: list[Block]  # one per built member
    splits: Mapping[str, Dataset]
    places: Places
    batch_size: int
    num_workers: int
    device: torch.device
    compute: torch.dtype
    storage: torch.dtype
    quiet: bool

    def extract_missing(self) -> int:
        """Fill the blocks; the number of images that this process ran."""
        if not any(block.refresh().missing(self.places) for block in self.blocks):
            return 0
        state = PartialState()
        with ExitStack() as stack:
            stack.callback(self.model.train, self.model.training)
            if self.device.type == "cpu":
                stack.enter_context(keep_freed_memory())
            if state.is_main_process:
                # All extractions lock in the same order, so that two of them cannot wait for each other.
                for _, block in sorted({block.folder: block for block in self.blocks}.items()):
                    stack.enter_context(block.lock())
            state.wait_for_everyone()
            passes = plan_passes([block.refresh().missing(self.places) for block in self.blocks], self.places)
            state.wait_for_everyone()  # no process writes before all have planned
            extracted = 0
            for positions, images in passes.items():
                shards = [images[start : start + SHARD_IMAGES] for start in range(0, len(images), SHARD_IMAGES)]
                extracted += self._run_pass(positions, shards[state.process_index :: state.num_processes])
            state.wait_for_everyone()
        for position, block in enumerate(self.blocks):
            if missing := block.refresh().missing(self.places):
                raise RuntimeError(f"member {position} lacks {len(missing)} images after extraction; report this.")
        return extracted

    def _run_pass(self, positions: tuple[int, ...], shards: list[list[bytes]]) -> int:
        """Run some members on the images of these shards and store each shard when it is complete.

        Batches never cross shards, so that a run that was killed and continued computes the very same numbers.
        """
        part, processor = self._select_members(positions)
        size = self.batch_size
        batches = [shard[start : start + size] for shard in shards for start in range(0, len(shard), size)]
        images, pin_memory = _PixelDataset(self.splits, self.places, processor), self.device.type == "cuda"
        loader = DataLoader(images, batch_sampler=batches, num_workers=self.num_workers, pin_memory=pin_memory)
        pixels = _load_batches(loader)
        with Progress(disable=self.quiet or not sys.stderr.isatty()) as progress:
            task = progress.add_task("features", total=len(batches))
            for shard in shards:
                features = []
                for _ in range(0, len(shard), size):
                    features.append(self._forward(part, positions, next(pixels)))
                    progress.advance(task)
                for position, parts in zip(positions, zip(*features, strict=True), strict=True):
                    self.blocks[position].write(shard, self._convert(torch.cat(parts), position, shard))
        return sum(map(len, shards))

    def _select_members(self, positions: tuple[int, ...]) -> tuple[PreTrainedModel, BaseImageProcessor]:
        """A model of these members alone, ready to run in float32, and its processor."""
        model, processor = self.model, self.processor
        if not is_ensemble(model):
            if processor is None and not model.name_or_path:
                raise ValueError(f"{type(model).__name__} was built in memory; pass the processor=... of its pixels.")
            processor = processor or AutoImageProcessor.from_pretrained(model.name_or_path)
        else:
            if processor is not None and len(positions) < len(model.members):
                raise ValueError("processor=... needs all members at once; extract with another store=...")
            model = model.export_active([model.config.built_members[position] for position in positions])
            processor = processor or ConcatEnsembleImageProcessor.from_config(model.config)
        if next(model.parameters()).dtype != torch.float32:  # half-precision weights compute in float32
            model = copy.deepcopy(model).float()
        layout = self.extractor.memory_format
        # transformers wraps `to` in a function without `self`.
        model.eval().to(self.device, memory_format=layout)  # pyright: ignore[reportArgumentType]
        return model, processor

    def _forward(self, part: PreTrainedModel, positions: Sequence[int], pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, D_k) float32 of each member, on the CPU."""
        autocast = torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32)
        with torch.inference_mode(not self.extractor.needs_gradients), autocast:
            pixels = pixels.to(self.device, non_blocking=True)
            return [block.float().cpu() for block in self.extractor.features(part, positions, pixels)]

    def _convert(self, features: torch.Tensor, position: int, shard: list[bytes]) -> torch.Tensor:
        """Features in the dtype in which they are stored. Raises ValueError naming the first image for which they are
        not finite."""
        stored = features.to(self.storage)
        rows = torch.nonzero(~torch.isfinite(stored).all(dim=1)).flatten().tolist()
        if rows:
            split, row = self.places[shard[rows[0]]]
            problem = "NaN or infinite features"
            if torch.isfinite(features[rows[0]]).all():
                problem = "features too large for float16 (use storage='float32')"
            image = f"image {row} of the {split} split ({len(rows)} such images in its shard)"
            raise ValueError(f"member {position} gives {problem} for {image}.")
        return stored


class _PixelDataset(TorchDataset):
    """`pixel_values` of an image by its hash."""

    def __init__(self, splits: Mapping[str, Dataset], places: Places, processor: BaseImageProcessor):
        self.splits, self.places, self.processor = splits, places, processor

    def __getitem__(self, image_hash: bytes) -> torch.Tensor:
        split, row = self.places[image_hash]
        rows = self.splits[split]
        try:
            image = read_image(rows, row)
        except ValueError as error:
            raise ValueError(f"the {split} split, {error}") from error
        try:
            # Our own processor, also one loaded from a repo, converts to what each member takes; others expect RGB.
            image = image if hasattr(self.processor, "geometries") else convert_image(image, "RGB")
            return self.processor([image], return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise ValueError(f"the {split} split, {describe_image(rows, row)}: {error.__cause__ or error}") from error


def _load_batches(loader: DataLoader) -> Iterator[torch.Tensor]:
    """The batches. torch wraps an error in a worker into its whole traceback; only its last line is raised."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def _is_loaded(dataset: DatasetDict | Dataset) -> TypeGuard[DatasetDict]:
    """Whether `load_data` made it."""
    if not isinstance(dataset, DatasetDict):
        return False
    return all(split.features.get("image") == Image(decode=False) for split in dataset.values())


def _to_transformers(model: Any) -> PreTrainedModel:
    """A timm model as an ensemble of one member; a transformers model, or what acts as one, stays as it is."""
    return assemble(model) if hasattr(model, "pretrained_cfg") else model


def _choose_device(device: str | torch.device | None) -> torch.device:
    state = PartialState()
    if device is None and state.num_processes > 1:
        device = state.device
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _first_places(hashes: dict[str, list[bytes]]) -> Places:
    places: Places = {}
    for split, images in hashes.items():
        for row, image in enumerate(images):
            places.setdefault(image, (split, row))
    return places
