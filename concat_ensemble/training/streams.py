"""Training images from a stream, which continues where it stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import IterableDataset as TorchStream

from concat_ensemble.data.images import decode_image
from concat_ensemble.training.batches import Augmentation, Part, Position
from concat_ensemble.training.signals import outlive_signals

BLOCK = 10_000  # images of a process that are shuffled among each other
START: Position = {"epoch": 0, "block": 0, "used": 0, "number": 0, "stream": None}


def read_stream(
    stream: IterableDataset,
    augmentation: Augmentation,
    *,
    size: int,
    workers: int,
    shard: tuple[int, int],
    done: int = 0,
    positions: Position | None = None,
    pin_memory: bool = False,
) -> Iterator[Part]:
    """Parts of `size` images without end, after the first `done` parts, where each worker stands at its position.

    The files are in another order in each epoch, and the images are shuffled in blocks, so that a position is the
    state of the stream at the begin of a block and a number of images in it.

    Raises:
        ValueError: if there are fewer files than workers, or other positions than those of these workers.
    """
    seed, count = augmentation.seeds[0], max(workers, 1)
    stream = split_dataset_by_node(stream.shuffle(seed=seed, buffer_size=1), *shard)
    if stream.num_shards < count:
        files = f"{stream.num_shards}, the number of files that this process streams"
        raise ValueError(f"num_workers={workers} must be at most {files}.")
    readers, positions = [shard[1], count], positions or {}
    before = next((position["readers"] for position in positions.values() if "readers" in position), readers)
    if before != readers or len(positions) != min(done, count):
        there = f", which had {before[0]} processes of {before[1]} workers" if before != readers else ""
        raise ValueError(
            f"num_workers={workers} in {shard[1]} processes cannot continue the stream that was stopped{there}: each "
            "worker reads its own files. Use as many as then."
        )
    # The loader takes a part from each worker in turn, beginning with the first one.
    ahead = done % count
    parts = _Parts(
        stream,
        augmentation,
        size=size,
        block=max(BLOCK // count, size),
        positions=positions,
        readers=readers,
        ahead=ahead,
    )
    loader = DataLoader(
        parts,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),
    )
    return itertools.islice(loader, ahead, None)


class _Parts(TorchStream):
    """Parts from the files of one worker. The first `ahead` workers begin with None, as they have given one part more
    than the others."""

    def __init__(
        self,
        stream: IterableDataset,
        augmentation: Augmentation,
        *,
        size: int,
        block: int,
        positions: Position,
        readers: list[int],
        ahead: int,
    ):
        self.stream, self.augmentation = stream, augmentation
        self.size, self.block, self.positions = size, block, positions
        self.readers, self.ahead = readers, ahead

    def __iter__(self) -> Iterator[Part | None]:
        worker = get_worker_info()  # datasets gives each worker its own files
        number = worker.id if worker else 0
        if number < self.ahead:
            yield None
        rows = self._rows(number)
        while True:
            part = list(itertools.islice(rows, self.size))
            yield self._make_part(number, part)

    def _make_part(self, worker: int, rows: Sequence[tuple[dict[str, Any], Position]]) -> Part:
        numbers = [position["number"] - 1 for _, position in rows]
        images = [
            decode_image(row["image"], f"image {number} of the stream")
            for (row, _), number in zip(rows, numbers, strict=True)
        ]
        draws = [(worker, number) for number in numbers]
        labels = torch.tensor([-1 if row["label"] is None else row["label"] for row, _ in rows])
        if (labels < 0).any():
            number = numbers[int((labels < 0).nonzero()[0])]
            raise ValueError(f"the label of image {number} of the stream is hidden; name another train_split.")
        position = rows[-1][1] | {"readers": self.readers}
        return Part(draws[0], numbers, self.augmentation(images, draws), labels, (worker, position))

    def _rows(self, worker: int) -> Iterator[tuple[dict[str, Any], Position]]:
        """Rows, each with the position after it."""
        position = START | self.positions.get(str(worker), {})
        while True:
            self.stream.set_epoch(position["epoch"])
            if position["stream"] is not None:
                self.stream.load_state_dict(position["stream"])
            rows, before = iter(self.stream), position["number"]
            while block := list(itertools.islice(rows, self.block)):
                numbers = (self.augmentation.seeds[0], worker, position["epoch"], position["block"])
                for place in np.random.default_rng(numbers).permutation(len(block))[position["used"] :]:
                    position = position | {"used": position["used"] + 1, "number": position["number"] + 1}
                    yield block[place], position
                state = self.stream.state_dict()
                position = position | {"block": position["block"] + 1, "used": 0, "stream": state}
            if position["number"] == before and not position["used"]:
                raise ValueError(f"the files of worker {worker} have no images; use fewer num_workers.")
            position = START | {"epoch": position["epoch"] + 1, "number": position["number"]}
