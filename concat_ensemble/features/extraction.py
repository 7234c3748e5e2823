"""Each member's features of each image, extracted once in its life: every probe, prefix and subset that follows reads
columns of one table.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoImageProcessor

from concat_ensemble.data.images import describe_image, read_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.projection import stored_projection
from concat_ensemble.features.store import Block, block_key, default_store, image_hashes
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor, convert_image

SHARD_IMAGES = 512  # what a kill loses at most
STORAGE = {"float32": torch.float32, "float16": torch.float16}


def extract_features(
    model: nn.Module,
    dataset: DatasetDict | Dataset,
    processor=None,
    *,
    ntk=None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    compute: torch.dtype = torch.float32,
    storage: str = "float32",
    store: Path | None = None,
    quiet: bool = False,
) -> FeatureTable:
    """The features of a frozen model for all images of a dataset: those that were never extracted are, once. What is stored
    are the members' own; a projection is applied when the table is read.

    All missing members run in one pass over the images. Under `accelerate launch` the images are shared out among the
    processes. A kill loses `SHARD_IMAGES` images at most; another process that wants the same features waits for these.

    Args:
        model: An ensemble; or any timm model, or any transformers model with a `pooler_output`, for a table of one
            block.
        dataset: From `load_data`; anything else is passed through it with its defaults.
        processor: What makes `pixel_values` of a list of PIL images; the model's own when left out.
        ntk: Gradients in place of pooled features, and which: see `concat_ensemble.features.ntk.NTK`.
        batch_size: Images in one forward pass.
        num_workers: Processes that read and transform images.
        device: Where the model runs; the GPU where there is one.
        compute: float32, or bfloat16 for autocast. Features of another precision are other features, kept apart.
        storage: "float32", or "float16" for half the disk.
        store: Folder of the features; one in `HF_ASSETS_CACHE` when left out.
        quiet: No progress bar (there is none without a terminal either).

    Raises:
        ValueError: naming the image that cannot be read, or for which a member gives NaN, infinite, or (in float16) too
            large features.
        OSError: when the disk is full; what was extracted is kept.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage={storage!r} must be {' or '.join(STORAGE)}.")
    if ntk and compute != torch.float32:
        raise ValueError(f"compute={compute}: gradients per image need torch.float32.")
    if not isinstance(dataset, DatasetDict) or any(
        s.features.get("image") != Image(decode=False) for s in dataset.values()
    ):
        dataset = load_data(dataset)
    if hasattr(model, "pretrained_cfg"):  # a timm model
        model = assemble(model)
    state = PartialState()
    device = torch.device(
        device or (state.device if state.num_processes > 1 else "cuda" if torch.cuda.is_available() else "cpu")
    )
    hashes = {name: image_hashes(split) for name, split in dataset.items()}
    places = {
        image: (name, n) for name, images in reversed(hashes.items()) for n, image in reversed(list(enumerate(images)))
    }
    images = list(dict.fromkeys(itertools.chain.from_iterable(hashes.values())))
    names = [f"{name} NTK" if ntk else name for name in _names(model)]
    ntks = ntk.for_members(model) if ntk else [None] * len(names)
    keys = _keys(model, processor, compute, STORAGE[storage], ntks)
    blocks = [Block((store or default_store()) / key, name) for key, name in zip(keys, names, strict=True)]
    was_training = model.training
    started, extracted = time.perf_counter(), 0
    if any(block.refresh().missing(images) for block in blocks):
        with ExitStack() as locks:
            if device.type == "cpu":
                locks.enter_context(keep_freed_memory())
            if state.is_main_process:  # in one order everywhere, so that two extractions cannot wait for each other
                for block in sorted(
                    {block.folder: block for block in blocks}.values(), key=lambda block: block.folder
                ):
                    locks.enter_context(block.lock())
            state.wait_for_everyone()
            work = _work(blocks, images)
            state.wait_for_everyone()  # all see the same work before any of it is done
            for wanted, group in work.items():
                part, transform = submodel(model, wanted, processor)
                shards = [group[n : n + SHARD_IMAGES] for n in range(0, len(group), SHARD_IMAGES)]
                mine = shards[state.process_index :: state.num_processes]
                own = [ntks[k] for k in wanted]
                run = _run(
                    part, transform, dataset, places, mine, compute, batch_size, num_workers, device, quiet, own
                )
                for shard, features in zip(mine, run, strict=True):
                    for k, block in zip(wanted, features, strict=True):
                        blocks[k].write(shard, _storable(block, STORAGE[storage], k, shard, places))
                    extracted += len(shard)
            state.wait_for_everyone()
    model.train(was_training)
    for k, block in enumerate(blocks):
        if left := block.refresh().missing(images):
            raise RuntimeError(f"{len(left)} images of member {k} were extracted and are not there; report this.")
    table = FeatureTable(
        {name: [block.rows(hashes[name]) for block in blocks] for name in dataset},
        {name: read_labels(split) for name, split in dataset.items()},
        class_names(next(iter(dataset.values()))),
        tuple(keys),
        extracted,
        extracted / (time.perf_counter() - started) if extracted else None,
    )
    projected = ntk is None and is_ensemble(model) and model.config.projection_dim is not None
    return stored_projection(model)(table) if projected else table


def _keys(model: nn.Module, processor, compute: torch.dtype, storage: torch.dtype, ntks: list) -> list[str]:
    """The name of each built member's block."""
    dtypes = {"compute": str(compute), "storage": str(storage)}
    given = None if processor is None else processor.to_dict()
    gradients = [ntk.computed if ntk else {} for ntk in ntks]  # pooled features keep the key that they always had
    if not is_ensemble(model):
        return [block_key(model, {"config": model.config.to_dict(), "processor": given, **dtypes, **gradients[0]})]
    computed = ("architecture", "model_args", "preprocessing")
    return [
        block_key(
            member,
            {name: model.config.members[int(k)][name] for name in computed} | {"processor": given, **dtypes, **own},
        )
        for (k, member), own in zip(model.members.items(), gradients, strict=True)
    ]


def _names(model: nn.Module) -> list[str]:
    if not is_ensemble(model):
        return [type(model).__name__]
    return [model.config.members[int(k)]["architecture"] for k in model.members]


def _work(blocks: list[Block], images: list[bytes]) -> dict[tuple[int, ...], list[bytes]]:
    """Which images have to go through which members: usually one group, since all that is missing runs in one pass."""
    missing = [block.refresh().missing(images) for block in blocks]
    groups: dict[tuple[int, ...], list[bytes]] = {}
    for image in images:
        if wanted := tuple(k for k, lacking in enumerate(missing) if image in lacking):
            groups.setdefault(wanted, []).append(image)
    return groups


def is_ensemble(model: nn.Module) -> bool:
    return getattr(model.config, "model_type", None) == "concat_ensemble"


def submodel(model: nn.Module, wanted: Sequence[int], processor):
    """The built members with these places as a model of their own, which sees only what they need, and its processor."""
    if not is_ensemble(model):
        if processor is None and not model.name_or_path:
            raise ValueError(
                f"{type(model).__name__} was not loaded from anywhere; pass the processor=... that makes its pixels."
            )
        return model, processor or AutoImageProcessor.from_pretrained(model.name_or_path)
    part = model.export_active([model.config.built_members[k] for k in wanted])
    if processor is not None and len(wanted) < len(model.members):
        raise ValueError("a processor of one's own needs all members at once; extract with another store=...")
    return part, processor or ConcatEnsembleImageProcessor.from_config(part.config)


def _run(
    part, processor, dataset, places, shards, compute, batch_size, num_workers, device, quiet, ntks
) -> Iterator[list[torch.Tensor]]:
    """For each shard of images, one (n, D_k) tensor per member. Batches never cross shards, so that a run that was
    killed and continued computes the very same numbers."""
    batches = [shard[n : n + batch_size] for shard in shards for n in range(0, len(shard), batch_size)]
    order = [places[image] for batch in batches for image in batch]
    starts = np.cumsum([0, *map(len, batches)])
    sampler = [list(range(start, stop)) for start, stop in itertools.pairwise(starts)]
    loader = DataLoader(
        Pixels(dataset, order, processor),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    bar = track(_told(loader), "features", len(batches), disable=quiet or not sys.stderr.isatty())
    if next(part.parameters()).dtype != torch.float32:
        part = copy.deepcopy(part).float()  # weights kept in half precision are computed with in full
    # Convolutional networks run faster in channels_last, on a CPU as on a GPU; their gradients per image do not.
    pooled = ntks[0] is None
    part = part.eval().to(device, memory_format=torch.channels_last if pooled else torch.contiguous_format)
    features: list[list[torch.Tensor]] = []
    sizes = iter(map(len, shards))
    size = next(sizes, 0)
    for pixels in bar:
        # Not around the loop: what runs where this generator is waited for would be in inference mode as well.
        with torch.inference_mode(pooled), torch.autocast(device.type, compute, enabled=compute != torch.float32):
            pixels = pixels.to(device, non_blocking=True)
            if not pooled:
                blocks = tuple(ntk.features(part, place, pixels) for place, ntk in enumerate(ntks))
            elif is_ensemble(part):
                blocks = part(pixels, output_member_features=True).member_features
            else:
                blocks = (part(pixel_values=pixels).pooler_output.flatten(1),)
            features.append([block.float().cpu() for block in blocks])
        if sum(len(batch[0]) for batch in features) == size:
            yield [torch.cat(block) for block in zip(*features, strict=True)]
            features, size = [], next(sizes, 0)


def _storable(block: torch.Tensor, storage: torch.dtype, k: int, shard: list[bytes], places) -> torch.Tensor:
    stored = block.to(storage)
    bad = torch.nonzero(~torch.isfinite(stored).all(dim=1)).flatten().tolist()
    if bad:
        split, number = places[shard[bad[0]]]
        finite = bool(torch.isfinite(block[bad[0]]).all())
        what = "features too large for float16 (use storage='float32')" if finite else "NaN or infinite features"
        raise ValueError(
            f"member {k} gives {what} for image {number} of the {split} split ({len(bad)} such images in its shard)."
        )
    return stored


def _told(loader: DataLoader) -> Iterator[torch.Tensor]:
    """The batches; an error in a worker, which torch tells as a whole traceback, as the one line that was raised there."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


class Pixels(TorchDataset):
    """`pixel_values` of the images at these places (split, number)."""

    def __init__(self, dataset: DatasetDict, order: list[tuple[str, int]], processor):
        self.dataset, self.order, self.processor = dataset, order, processor

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> torch.Tensor:
        name, number = self.order[index]
        split = self.dataset[name]
        try:
            image = read_image(split, number)
        except ValueError as error:
            raise ValueError(f"the {name} split, {error}") from error
        try:
            # Our own processor converts to what each member takes; others expect RGB.
            image = image if isinstance(self.processor, ConcatEnsembleImageProcessor) else convert_image(image, "RGB")
            return self.processor([image], return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise ValueError(
                f"the {name} split, {describe_image(split, number)}: {error.__cause__ or error}"
            ) from error
