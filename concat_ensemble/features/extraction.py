"""Features of frozen members: each image goes through each member once, and later tables read the stored rows."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from concat_ensemble.console import show_progress
from concat_ensemble.data.bad_images import BadImages, usable_rows
from concat_ensemble.data.labels import class_names, read_groups, read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.features.extractor import Extractor, PooledFeatures
from concat_ensemble.features.index import HashIndex, to_bytes, to_hashes
from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.ntk import NTK, NTKFeatures
from concat_ensemble.features.precision import full_float32
from concat_ensemble.features.projection import stored_projection
from concat_ensemble.features.reading import Batch, ImageReader, Positions, read_batches
from concat_ensemble.features.shares import LoadedShare, Share, StreamedShare, prepare_streams, shared_folder
from concat_ensemble.features.standardized import default_device
from concat_ensemble.features.store import Block, block_key, default_store
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble, is_ensemble
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor
from concat_ensemble.processes import process_state

FIRST_SHARD, SHARD_IMAGES = 32, 512  # images in the first files and in later ones; see `shard_sizes`
STORAGE = {"float32": torch.float32, "float16": torch.float16}
LACKING = "lacking"  # the file by which a process tells the others that it has met an image to extract


def extract_features(
    model: nn.Module,
    dataset: DatasetDict | Dataset | IterableDatasetDict | IterableDataset,
    processor: BaseImageProcessor | None = None,
    *,
    ntk: NTK | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    compute: torch.dtype = torch.float32,
    storage: str = "float32",
    store: Path | None = None,
    skip_bad: bool = False,
    quiet: bool = False,
    title: str = "features",
) -> FeatureTable:
    """Features of a frozen model for all images of a dataset. Only what is not stored yet is extracted.

    The members' own features are stored; a projection is applied when the table is read. Each image is read once, and
    all members that lack it run on it. Under `accelerate launch` each process reads its share of the images, and all
    return the whole table; the store has to be a folder that all see. Ctrl-C loses the batch that is being computed,
    and a kill at most half of what was done and never more than `SHARD_IMAGES` images of each process; the same call
    reads the images again, and extracts those that are not stored. A second extraction that lacks the same features
    waits for the first. Images that cannot be read do not stop the others: all are named in one error at the end, when
    everything else is stored.

    Args:
        model: An ensemble; or, for a table of one block, a timm model or a transformers model with a `pooler_output`.
        dataset: From `load_data`. Another `Dataset` or `DatasetDict` is passed through `load_data` with its defaults.
            Of an `IterableDataset` or `IterableDatasetDict` all images are read, in order; nothing is cut off, and its
            labels must be a `ClassLabel`. Several processes share its files, so it should have as many of them.
        processor: Makes `pixel_values` from a list of PIL images. Default: the model's own.
        ntk: Store gradients with these settings in place of pooled features.
        device: Where the model runs; afterwards it is back where it was. Default: the GPU if there is one, else the
            CPU.
        compute: float32, or bfloat16 for autocast. Each precision has blocks of its own. float32 on a GPU is float32
            itself, not TF32, so that the stored features are those of any other device up to rounding.
        storage: "float32", or "float16" for half the disk space.
        store: Folder of the stored features. Default: one in `HF_ASSETS_CACHE`.
        skip_bad: Leave images out of the table that cannot be read; `FeatureTable.skipped` has their rows.
        quiet: Show no progress; else stderr gets a bar on a terminal, and lines elsewhere.
        title: What the progress is called.

    Raises:
        ValueError: naming the images that cannot be read, of all splits (with `skip_bad` only if no image of a split
            or class is left), or an image for which a member gives NaN, infinite, or (in float16) too large features;
            if the processes do not share the store; for a stream that cannot be read or does not state its classes.
        OSError: if the disk is full; what was extracted before is kept.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage={storage!r} must be {' or '.join(STORAGE)}.")
    if ntk and compute != torch.float32:
        raise ValueError(f"compute={compute}: gradients per image need torch.float32.")
    network = _to_transformers(model)
    extractor = NTKFeatures(ntk, network) if ntk else PooledFeatures()
    folder, settings = store or default_store(), {"compute": str(compute), "storage": str(STORAGE[storage])}
    names = block_names(network, processor, extractor, settings)
    run = _Run(
        model=network,
        processor=processor,
        extractor=extractor,
        blocks=[
            Block(folder / key, architecture, num_features=extractor.num_features(network, k), dtype=STORAGE[storage])
            for k, (key, architecture) in enumerate(names)
        ],
        share=_plan_share(dataset, min(batch_size, SHARD_IMAGES)),
        batch_size=min(batch_size, SHARD_IMAGES),
        num_workers=num_workers,
        device=_choose_device(device),
        compute=compute,
        storage=STORAGE[storage],
        quiet=quiet,
        title=title,
    )
    with shared_folder(folder) as exchange:
        started = time.perf_counter()
        extracted = run.extract_missing(exchange)
        seconds = time.perf_counter() - started
        splits, hashes = run.share.gather(exchange)
    table = _build_table(run, splits, hashes, names, skip_bad=skip_bad)
    table = dataclasses.replace(
        table, extracted=extracted, images_per_second=extracted / seconds if extracted else None
    )
    if extractor.uses_projection and is_ensemble(network) and network.projection is not None:
        return stored_projection(network.projection)(table)
    return table


def _plan_share(dataset: Any, batch_size: int) -> Share:
    """What this process reads."""
    if isinstance(dataset, IterableDataset | IterableDatasetDict):
        return StreamedShare(prepare_streams(dataset), partial(_endless_shard_sizes, batch_size))
    splits = dataset if _is_loaded(dataset) else load_data(dataset)
    total = sum(map(len, splits.values()))
    return LoadedShare({str(name): rows for name, rows in splits.items()}, shard_sizes(total, 0, batch_size))


def _build_table(
    run: _Run,
    splits: Mapping[str, Dataset],
    hashes: Mapping[str, np.ndarray],
    names: list[tuple[str, str]],
    *,
    skip_bad: bool,
) -> FeatureTable:
    """The table of the rows whose images can be used; `names` are those of `block_names`."""
    architectures = Counter(architecture for _, architecture in names)
    bad = _bad_rows(hashes, run.unreadable)
    rows = usable_rows(splits, bad, skip_bad=skip_bad)
    used = {split: hashes[split][rows[split]] if bad[split] else hashes[split] for split in splits}
    groups = read_groups(splits)
    return FeatureTable(
        {split: [block.rows(used[split]) for block in run.blocks] for split in splits},
        {split: read_labels(images)[rows[split]] for split, images in splits.items()},
        class_names(next(iter(splits.values()))),
        tuple(key for key, _ in names),
        groups=None if groups is None else {split: groups[split][rows[split]] for split in splits},
        skipped={split: sorted(bad[split]) for split in splits} if run.unreadable else None,
        names=tuple(name if architectures[name] == 1 else f"{name} ({k})" for k, (_, name) in enumerate(names)),
    )


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


def shard_sizes(num_images: int, stored: int, batch_size: int) -> list[int]:
    """Numbers of images in the next files of a block that has `stored` rows of a dataset: as many as are stored, so
    that a kill loses at most half of the work, between `FIRST_SHARD` and `SHARD_IMAGES`, rounded up to whole batches.
    So the batches, and with them the features, are the same whatever the files."""
    sizes = []
    for size in _endless_shard_sizes(batch_size, stored):
        if num_images <= 0:
            break
        sizes.append(min(size, num_images))
        num_images -= sizes[-1]
    return sizes


def _endless_shard_sizes(batch_size: int, stored: int = 0) -> Iterator[int]:
    while True:
        size = math.ceil(min(max(stored, FIRST_SHARD), SHARD_IMAGES) / batch_size) * batch_size
        yield size
        stored += size


class _Place(NamedTuple):
    """Where an image was met."""

    split: str
    row: int
    image_hash: bytes


@dataclass(kw_only=True)
class _Run:
    """Reads this process's share of the images, runs the members on those that their blocks lack, and writes shard
    after shard."""

    model: PreTrainedModel
    processor: BaseImageProcessor | None  # None: the model's own
    extractor: Extractor
    blocks: list[Block]  # one per built member
    share: Share
    batch_size: int
    num_workers: int
    device: torch.device
    compute: torch.dtype
    storage: torch.dtype
    quiet: bool
    title: str
    unreadable: dict[bytes, str] = field(default_factory=dict)  # image hash -> why; in the end, of all processes
    _bad: BadImages = field(default_factory=dict)  # where this process met them
    _met: HashIndex = field(default_factory=HashIndex)  # usable images
    _done: int = 0  # images met that were stored, or that are computed
    _end: float = 0  # of the file that is filled, as a number of these images
    _waiting: dict[Positions, list[tuple[list[_Place], torch.Tensor]]] = field(default_factory=dict)  # for a batch
    _computed: dict[Positions, list[tuple[list[_Place], list[torch.Tensor]]]] = field(default_factory=dict)
    _parts: dict[Positions, PreTrainedModel] = field(default_factory=dict)

    def extract_missing(self, folder: Path) -> int:
        """Fill the blocks. Returns the number of images that this process ran. `folder` is seen by all processes."""
        for block in self.blocks:
            block.refresh()
        start = self._skip_stored(folder)
        if all(gather_object([start == self.share.total])):
            return 0
        state = process_state()
        with ExitStack() as stack:
            stack.callback(self.model.train, self.model.training)
            where = next(self.model.parameters()).device
            stack.callback(lambda: self.model.to(where))  # pyright: ignore[reportArgumentType]
            if self.device.type == "cpu":
                stack.enter_context(keep_freed_memory())
            if state.is_main_process:
                # All extractions lock in the same order, so that two of them cannot wait for each other.
                for _, block in sorted({block.folder: block for block in self.blocks}.items()):
                    stack.enter_context(block.lock())
            state.wait_for_everyone()
            for block in self.blocks:
                block.refresh()
            extracted = self._extract(start)
            gave_up = gather_object([self.share.describe(self._bad) if self._is_hopeless() else ""])
            for unreadable in gather_object([self.unreadable]):  # waits for everyone
                self.unreadable |= unreadable
        for problem in filter(None, gave_up):
            head = f"none of the first {SHARD_IMAGES} images can be used, so the others were not tried"
            raise ValueError(f"{head}; {problem}.")
        for block in self.blocks:
            block.refresh()
        return extracted

    def _skip_stored(self, folder: Path) -> int:
        """Read images up to the first one that some member lacks for some process, without a lock and without decoding
        them. Returns how many this process has read."""
        start = 0
        if self.share.total is None:  # a stream is read only once
            return start
        images = self.share.images()
        first = list(itertools.islice(images, self.batch_size))
        # No other process is started to find out that there is work to do.
        batches = itertools.chain(self._read([first] if first else [], 0), self._read(self._batches(images)))
        for batch in batches:
            if (folder / LACKING).exists():
                break
            if not batch.stored.all():
                if process_state().num_processes > 1:
                    (folder / LACKING).touch()
                break
            self._take(batch)
            start += len(batch.places)
        return start

    def _extract(self, start: int) -> int:
        """Extract what is missing from image `start` of the share on. Returns the number of images that were run."""
        state, extracted = process_state(), 0
        share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        self._resolve_processor()
        batches = self._read(self._batches(self.share.images()), decode=True)
        with show_progress(f"{self.title}{share}", self.share.total, quiet=self.quiet) as advance:
            advance(start)
            try:
                for batch in itertools.chain(batches, [None]):
                    if batch is not None:
                        self._take(batch)
                        advance(len(batch.places))
                    for positions, places, pixels in self._full_batches(last=batch is None):
                        self._compute(positions, places, pixels)
                        extracted += len(places)
                    if self._is_hopeless():
                        break
            finally:  # also after Ctrl-C
                self._write()
        return extracted

    def _compute(self, positions: Positions, places: list[_Place], pixels: torch.Tensor) -> None:
        features = self._forward(self._select_members(positions), positions, pixels)
        self._computed.setdefault(positions, []).append((places, features))
        self._count(len(places))

    def _count(self, images: int) -> None:
        """Count images that are computed or were stored, and end the file that they fill."""
        self._done += images
        if self._done >= self._end:
            self._write()
            self._end = next((end for end in self.share.shard_ends() if end > self._done), math.inf)

    def _is_hopeless(self) -> bool:
        """Whether none of the first `SHARD_IMAGES` images can be read: then it is hardly a matter of single images,
        and the others would take their time to fail as well."""
        return len(self.unreadable) >= SHARD_IMAGES and not self._done and not any(self._waiting.values())

    def _batches(self, images: Iterator[Any]) -> Iterator[list[Any]]:
        while batch := list(itertools.islice(images, self.batch_size)):
            yield batch

    def _read(self, batches: Any, num_workers: int | None = None, *, decode: bool = False) -> Iterator[Batch]:
        reader = ImageReader(self.share.splits, self.blocks, self._make_processor if decode else None)
        workers = self.num_workers if num_workers is None else num_workers
        return read_batches(reader, batches, num_workers=workers, pin_memory=decode and self.device.type == "cuda")

    def _take(self, batch: Batch) -> None:
        """Note the images of a batch, and put those aside that are to be run. Of copies the first one counts."""
        self.share.record(batch)
        for number, why in batch.unreadable.items():
            split, row = batch.places[number]
            self._bad.setdefault(split, {})[row] = why
            self.unreadable[to_bytes(batch.hashes[number : number + 1])[0]] = why
        self._count(int(self._meet(batch.hashes[batch.stored]).sum()))
        for positions, (numbers, pixels) in batch.pixels.items():
            new = self._meet(batch.hashes[numbers])
            hashes = to_bytes(batch.hashes[numbers])
            places = [_Place(*batch.places[n], hashes[k]) for k, n in enumerate(numbers) if new[k]]
            if places:
                pixels = pixels if new.all() else pixels[torch.from_numpy(new)]
                self._waiting.setdefault(positions, []).append((places, pixels))

    def _meet(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) whether an image is met for the first time."""
        new = self._met.find(hashes) < 0
        first = np.zeros(len(hashes), bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        self._met.add(hashes[new & first], np.zeros((new & first).sum(), np.int64))
        return new & first

    def _full_batches(self, *, last: bool) -> Iterator[tuple[Positions, list[_Place], torch.Tensor]]:
        """Batches of `batch_size` readable images for the same members, of those that wait; with `last` also the rest.

        So the batches depend on the readable images alone, and a run that was killed and continued, and meets the
        others once more, computes the very same numbers.
        """
        for positions, waiting in self._waiting.items():
            count = sum(len(places) for places, _ in waiting)
            while count >= self.batch_size or (last and count):
                places = [place for own, _ in waiting for place in own]
                pixels = waiting[0][1] if len(waiting) == 1 else torch.cat([own for _, own in waiting])
                size = self.batch_size
                waiting[:] = [(places[size:], pixels[size:])] if count > size else []
                count -= min(size, count)
                yield positions, places[:size], pixels[:size]

    def _write(self) -> None:
        """Store a shard of each member of what is computed."""
        for positions, batches in self._computed.items():
            places = [place for own, _ in batches for place in own]
            for position, parts in zip(positions, zip(*(own for _, own in batches), strict=True), strict=True):
                features = self._convert(torch.cat(parts), position, places)
                self.blocks[position].write([place.image_hash for place in places], features)
        self._computed.clear()

    def _resolve_processor(self) -> None:
        """Find the processor of a model that is no ensemble."""
        if self.processor is None and not is_ensemble(self.model):
            if not self.model.name_or_path:
                name = type(self.model).__name__
                raise ValueError(f"{name} was built in memory; pass the processor=... of its pixels.")
            self.processor = AutoImageProcessor.from_pretrained(self.model.name_or_path)

    def _make_processor(self, positions: Positions) -> BaseImageProcessor:
        """The processor of these members. Raises ValueError if there is only one of all members."""
        if not is_ensemble(self.model):
            assert self.processor is not None
            return self.processor
        if self.processor is not None:
            if len(positions) < len(self.blocks):
                raise ValueError("processor=... needs all members at once; extract with another store=...")
            return self.processor
        config = self.model.config
        members = [config.members[config.built_members[position]] for position in positions]
        chosen = ConcatEnsembleConfig(members=members, dynamic_img_size=config.dynamic_img_size)
        return ConcatEnsembleImageProcessor.from_config(chosen)

    def _select_members(self, positions: Positions) -> PreTrainedModel:
        """A model of these members alone, ready to run in float32."""
        if positions not in self._parts:
            model = self.model
            if is_ensemble(model):
                model = model.export_active([model.config.built_members[position] for position in positions])
            if next(model.parameters()).dtype != torch.float32:  # half-precision weights compute in float32
                model = copy.deepcopy(model).float()
            layout = self.extractor.memory_format
            # transformers wraps `to` in a function without `self`.
            model.eval().to(self.device, memory_format=layout)  # pyright: ignore[reportArgumentType]
            self._parts[positions] = model
        return self._parts[positions]

    def _forward(self, part: PreTrainedModel, positions: Sequence[int], pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, D_k) float32 of each member, on the CPU."""
        autocast = torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32)
        with torch.inference_mode(not self.extractor.needs_gradients), autocast, full_float32():
            pixels = pixels.to(self.device, non_blocking=True)
            return [block.float().cpu() for block in self.extractor.features(part, positions, pixels)]

    def _convert(self, features: torch.Tensor, position: int, shard: list[_Place]) -> torch.Tensor:
        """Features in the dtype in which they are stored. Raises ValueError naming the first image for which they are
        not finite."""
        stored = features.to(self.storage)
        rows = torch.nonzero(~torch.isfinite(stored).all(dim=1)).flatten().tolist()
        if rows:
            split, row, _ = shard[rows[0]]
            problem = "NaN or infinite features"
            if torch.isfinite(features[rows[0]]).all():
                problem = "features too large for float16 (use storage='float32')"
            image = f"image {row} of the {split} split ({len(rows)} such images in its shard)"
            raise ValueError(f"member {position} gives {problem} for {image}.")
        return stored


def _bad_rows(hashes: Mapping[str, np.ndarray], unreadable: Mapping[bytes, str]) -> BadImages:
    """Every row whose image is unreadable: copies of an image share its hash."""
    bad, reasons = HashIndex(), list(unreadable.values())
    bad.add(to_hashes(unreadable), np.arange(len(unreadable)))
    rows: BadImages = {}
    for split, images in hashes.items():
        numbers = bad.find(images)
        rows[split] = {int(row): reasons[numbers[row]] for row in np.flatnonzero(numbers >= 0)}
    return rows


def _is_loaded(dataset: Any) -> TypeGuard[DatasetDict]:
    """Whether `load_data` made it."""
    if not isinstance(dataset, DatasetDict):
        return False
    return all(split.features.get("image") == Image(decode=False) for split in dataset.values())


def _to_transformers(model: Any) -> PreTrainedModel:
    """A timm model as an ensemble of one member; a transformers model, or what acts as one, stays as it is."""
    return assemble(model) if hasattr(model, "pretrained_cfg") else model


def _choose_device(device: str | torch.device | None) -> torch.device:
    state = process_state()
    if device is None and state.num_processes > 1:
        device = state.device
    return torch.device(device or default_device())
