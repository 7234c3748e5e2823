"""Features of frozen members: each image goes through each member once, and later tables read the stored rows."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, Image
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from concat_ensemble.console import show_progress
from concat_ensemble.data.bad_images import BadImages, describe_bad_images, usable_rows
from concat_ensemble.data.images import describe_read_error, image_hashes, open_image, processor_input
from concat_ensemble.data.labels import class_names, read_groups, read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.features.extractor import Extractor, PooledFeatures
from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.ntk import NTK, NTKFeatures
from concat_ensemble.features.precision import full_float32
from concat_ensemble.features.projection import stored_projection
from concat_ensemble.features.standardized import default_device
from concat_ensemble.features.store import Block, block_key, default_store
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble, is_ensemble
from concat_ensemble.modeling.image_processing_concat_ensemble import (
    ConcatEnsembleImageProcessor,
    check_resizing,
    convert_image,
)

FIRST_SHARD, SHARD_IMAGES = 32, 512  # images in the first files and in later ones; see `shard_sizes`
OTHER_GEOMETRY = {"input_size": (3, 512, 512), "crop_pct": 1.0, "crop_mode": "center"}
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
    skip_bad: bool = False,
    quiet: bool = False,
) -> FeatureTable:
    """Features of a frozen model for all images of a dataset. Only what is not stored yet is extracted.

    The members' own features are stored; a projection is applied when the table is read. All missing members run in
    one pass over the images. Under `accelerate launch` the processes share the images. Ctrl-C loses the batch that is
    being computed, and a kill at most half of what was done and never more than `SHARD_IMAGES` images; the same call
    goes on. A second process that needs the same features waits for the first. Images that cannot be read do not stop
    the others: all are named in one error at the end, when everything else is stored.

    Args:
        model: An ensemble; or, for a table of one block, a timm model or a transformers model with a `pooler_output`.
        dataset: From `load_data`. Any other dataset is passed through `load_data` with its defaults.
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

    Raises:
        ValueError: naming the images that cannot be read, of all splits (with `skip_bad` only if no image of a split
            or class is left), or an image for which a member gives NaN, infinite, or (in float16) too large features.
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
    dims = [extractor.num_features(network, position) for position in range(len(names))]
    blocks = [
        Block((store or default_store()) / key, architecture, num_features=dim, dtype=STORAGE[storage])
        for (key, architecture), dim in zip(names, dims, strict=True)
    ]
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
    extracted, unreadable = run.extract_missing()
    seconds = time.perf_counter() - started
    bad = _bad_rows(hashes, unreadable)
    rows = usable_rows(splits, bad, skip_bad=skip_bad)
    groups = read_groups(splits)
    table = FeatureTable(
        {split: [block.rows([hashes[split][row] for row in rows[split]]) for block in blocks] for split in splits},
        {split: read_labels(images)[rows[split]] for split, images in splits.items()},
        class_names(next(iter(splits.values()))),
        tuple(key for key, _ in names),
        extracted,
        extracted / seconds if extracted else None,
        None if groups is None else {split: groups[split][rows[split]] for split in splits},
        {split: sorted(bad[split]) for split in splits} if unreadable else None,
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


def shard_sizes(num_images: int, stored: int, batch_size: int) -> list[int]:
    """Numbers of images in the next files of a block that has `stored` rows of a dataset: as many as are stored, so
    that a kill loses at most half of the work, between `FIRST_SHARD` and `SHARD_IMAGES`, rounded up to whole batches.
    So the batches, and with them the features, are the same whatever the files."""
    sizes = []
    while num_images > 0:
        batches = math.ceil(min(max(stored, FIRST_SHARD), SHARD_IMAGES) / batch_size)
        sizes.append(min(batches * batch_size, num_images))
        stored, num_images = stored + sizes[-1], num_images - sizes[-1]
    return sizes


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

    def extract_missing(self) -> tuple[int, dict[bytes, str]]:
        """Fill the blocks. Returns the number of images that this process ran, and why images could not be read."""
        if not any(block.refresh().missing(self.places) for block in self.blocks):
            return 0, {}
        state = PartialState()
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
            missing = [block.refresh().missing(self.places) for block in self.blocks]
            stored, passes = [len(self.places) - len(images) for images in missing], plan_passes(missing, self.places)
            state.wait_for_everyone()  # no process writes before all have planned
            extracted, unreadable = 0, {}
            for positions, images in passes.items():
                rest, first = iter(images), min(stored[position] for position in positions)
                sizes = shard_sizes(len(images), first, min(self.batch_size, SHARD_IMAGES))
                pieces = [list(itertools.islice(rest, size)) for size in sizes]
                own = pieces[state.process_index :: state.num_processes]
                extracted += self._run_pass(positions, own, unreadable)
                for position in positions:
                    stored[position] += len(images)
            for others in gather_object([unreadable]):  # waits for everyone
                unreadable |= others
        self._check_complete(unreadable)
        return extracted, unreadable

    def _check_complete(self, unreadable: dict[bytes, str]) -> None:
        """Raise ValueError if a process has given up since it could read none of its images."""
        for position, block in enumerate(self.blocks):
            missing = block.refresh().missing(self.places) - unreadable.keys()
            if missing and len(unreadable) >= SHARD_IMAGES:
                bad: BadImages = {split: {} for split in self.splits}
                for image, reason in unreadable.items():
                    split, row = self.places[image]
                    bad[split][row] = reason
                problem = f"none of the first {SHARD_IMAGES} images can be used, so the others were not tried"
                raise ValueError(f"{problem}; {describe_bad_images(self.splits, bad)}.")
            if missing:
                raise RuntimeError(f"member {position} lacks {len(missing)} images after extraction; report this.")

    def _run_pass(self, positions: tuple[int, ...], pieces: list[list[bytes]], unreadable: dict[bytes, str]) -> int:
        """Run some members on the images of these pieces and store them in shards of as many readable images as the
        pieces have. Adds the others to `unreadable`. Returns the number of images that were run."""
        part, processor = self._select_members(positions)
        size, state = min(self.batch_size, SHARD_IMAGES), PartialState()
        batches = [piece[start : start + size] for piece in pieces for start in range(0, len(piece), size)]
        loader = DataLoader(
            _PixelDataset(self.splits, self.places, processor),
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        loaded = _load_batches(loader)
        if all(len(self.blocks[position].missing(self.places)) == len(self.places) for position in positions):
            loaded = _give_up(loaded)
        share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        extracted, sizes, computed = 0, [len(piece) for piece in pieces], []
        with show_progress(f"features{share}", sum(map(len, pieces)), quiet=self.quiet) as advance:
            try:
                for images, pixels in _readable_batches(loaded, size, unreadable):
                    computed.append((images, self._forward(part, positions, pixels)))
                    extracted += len(images)
                    advance(len(images))
                    if sum(len(batch) for batch, _ in computed) >= sizes[0]:
                        self._write(positions, computed)
                        computed, sizes = [], sizes[1:]
            finally:  # also after Ctrl-C
                self._write(positions, computed)
            advance(sum(image in unreadable for piece in pieces for image in piece))
        return extracted

    def _write(self, positions: Sequence[int], computed: list[tuple[list[bytes], list[torch.Tensor]]]) -> None:
        """Store a shard of each member. `computed`: for each batch, its images and (B, D_k) of each member."""
        if not computed:
            return
        shard = [image for images, _ in computed for image in images]
        features = [parts for _, parts in computed]
        for position, parts in zip(positions, zip(*features, strict=True), strict=True):
            self.blocks[position].write(shard, self._convert(torch.cat(parts), position, shard))

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
        with torch.inference_mode(not self.extractor.needs_gradients), autocast, full_float32():
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
    """`pixel_values` of an image by its hash, or why it cannot be read."""

    def __init__(self, splits: Mapping[str, Dataset], places: Places, processor: BaseImageProcessor):
        self.splits, self.places, self.processor = splits, places, processor

    def __getitem__(self, image_hash: bytes) -> tuple[bytes, torch.Tensor | str]:
        split, row = self.places[image_hash]
        try:
            encoded = self.splits[split][row]["image"]
            # Our own processor, also one loaded from a repo, converts to what each member takes; others expect RGB.
            is_ours = hasattr(self.processor, "geometries")
            image = processor_input(encoded, self.processor) if is_ours else _open_rgb(encoded)
            return image_hash, self.processor([image], return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # of all kinds: a damaged file may only fail in the processor
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            return image_hash, describe_read_error(cause)


def _open_rgb(encoded: dict[str, Any]) -> PIL.Image.Image:
    """An image for a processor of another kind, which may enlarge the shorter side."""
    image = open_image(encoded)
    check_resizing(image.width, image.height, [OTHER_GEOMETRY])
    return convert_image(image, "RGB")


class _Loaded(NamedTuple):
    """A batch as it is loaded."""

    images: list[bytes]  # hashes of the readable ones
    pixels: torch.Tensor | None  # of these; None if there are none
    unreadable: dict[bytes, str]  # hashes of the others, and why


def _collate(batch: list[tuple[bytes, torch.Tensor | str]]) -> _Loaded:
    readable = {image: pixels for image, pixels in batch if isinstance(pixels, torch.Tensor)}
    shapes = sorted({tuple(pixels.shape) for pixels in readable.values()})
    if len(shapes) > 1:
        problem = f"processor=... makes pixel_values of several shapes, such as {shapes[0]} and {shapes[-1]}"
        raise ValueError(f"{problem}; it must make one, by resizing or cropping.")
    pixels = default_collate(list(readable.values())) if readable else None
    return _Loaded(list(readable), pixels, {image: why for image, why in batch if isinstance(why, str)})


def _readable_batches(
    batches: Iterable[_Loaded], size: int, unreadable: dict[bytes, str]
) -> Iterator[tuple[list[bytes], torch.Tensor]]:
    """Batches of `size` readable images: those that are loaded, if all are readable. Adds the others to `unreadable`.

    So the batches depend on the readable images alone, and a run that was killed and continued, and meets the others
    once more, computes the very same numbers.
    """
    images, waiting = [], []
    for batch in batches:
        unreadable |= batch.unreadable
        if batch.pixels is None:
            continue
        images += batch.images
        waiting.append(batch.pixels)
        while len(images) >= size:
            pixels = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            yield images[:size], pixels[:size]
            images, waiting = images[size:], [pixels[size:]] if len(pixels) > size else []
    if images:
        yield images, torch.cat(waiting)


def _give_up(batches: Iterable[_Loaded]) -> Iterator[_Loaded]:
    """The batches, or those with the first `SHARD_IMAGES` images if none of these can be read: then it is hardly a
    matter of single images, and the others would take their time to fail as well."""
    failed, any_readable = 0, False
    for batch in batches:
        yield batch
        failed, any_readable = failed + len(batch.unreadable), any_readable or batch.pixels is not None
        if failed >= SHARD_IMAGES and not any_readable:
            return


def _load_batches(loader: DataLoader) -> Iterator[_Loaded]:
    """The batches. torch wraps an error in a worker into its whole traceback; only its last line is raised."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def _bad_rows(hashes: Mapping[str, list[bytes]], unreadable: Mapping[bytes, str]) -> BadImages:
    """Every row whose image is unreadable: copies of an image share its hash."""
    if not unreadable:
        return {split: {} for split in hashes}
    return {
        split: {row: unreadable[image] for row, image in enumerate(images) if image in unreadable}
        for split, images in hashes.items()
    }


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
    return torch.device(device or default_device())


def _first_places(hashes: dict[str, list[bytes]]) -> Places:
    places: Places = {}
    for split, images in hashes.items():
        for row, image in enumerate(images):
            places.setdefault(image, (split, row))
    return places
