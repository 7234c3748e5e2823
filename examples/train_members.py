"""Train K networks for T/K steps each, concatenate them, and probe the concatenation on classes that none has seen.

    accelerate launch --cpu examples/train_members.py
    accelerate launch examples/train_members.py --dataset uoft-cs/cifar10 --size 32 --steps 20000

Half of the classes are for training the members and the other half for probing them. Run it once more with
`--members 1` for one network of the same number of steps. `training/pretrain_members.py` is the script with recipes,
checkpoints, streaming and everything else.
"""

import argparse

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Image
from timm.data import create_transform, resolve_data_config
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, RandomSampler

from concat_ensemble import LinearProbe, assemble, extract_features, load_data


def create_member(options, num_classes):
    """A timm model that states the preprocessing it is trained with, which the ensemble takes over."""
    small = {"channels": (8, 16, 32, 64), "stem_width": 8} if options.architecture == "resnet10t" else {}
    preprocessing = {
        "input_size": (3, options.size, options.size),
        "crop_pct": 1.0,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    return timm.create_model(
        options.architecture, num_classes=num_classes, pretrained_cfg_overlay=preprocessing, **small
    )


def create_loader(split, model, options, num_batches):
    """`num_batches` batches of randomly cropped images, drawn with replacement, and their labels."""
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config, is_training=True, scale=(0.6, 1.0), hflip=0.0, color_jitter=None)

    def augment(rows):
        pixels = [transform(image.convert("RGB")) for image in rows["image"]]
        return {"pixels": pixels, "labels": rows["label"]}

    def collate(rows):
        return torch.stack([row["pixels"] for row in rows]), torch.tensor([row["labels"] for row in rows])

    images = split.cast_column("image", Image()).with_transform(augment)
    sampler = RandomSampler(images, replacement=True, num_samples=num_batches * options.batch_size)
    return DataLoader(images, options.batch_size, sampler=sampler, collate_fn=collate)


def train_member(accelerator, split, options, seed):
    """Train one network from its own seed for its share of the steps."""
    set_seed(seed)
    model = create_member(options, split.features["label"].num_classes)
    # Each process takes its share of the batches, so that every process makes the same number of steps.
    num_batches = options.steps // options.members * accelerator.num_processes
    loader = create_loader(split, model, options, num_batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, options.lr, total_steps=num_batches)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    model.train()
    for step, (pixels, labels) in enumerate(loader, start=1):
        loss = cross_entropy(model(pixels), labels)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == len(loader):
            accelerator.print(f"member {seed}, step {step}: loss {loss.item():.3f}")
    member = accelerator.unwrap_model(model).cpu().eval()
    accelerator.free_memory()
    return member


def probe(table):
    """Share of the test images that a linear probe classifies correctly."""
    return LinearProbe().fit(table["train"], validation=table["validation"]).score(table["test"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="scattered:digits", help="anything that load_data reads")
    parser.add_argument("--architecture", default="resnet10t", help="a timm architecture; resnet10t is made small")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--members", type=int, default=4, help="K")
    parser.add_argument("--steps", type=int, default=1600, help="T, of all members together")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch of one process")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the first member; the others have the seeds after it")
    parser.add_argument("--limit", type=int, help="use at most this many images of each split")
    parser.add_argument("--output", default="runs/trained-members")
    options = parser.parse_args()
    if not 1 <= options.members <= options.steps:
        parser.error(f"--members {options.members} must be between 1 and --steps {options.steps}")

    accelerator = Accelerator()
    num_classes = load_data(options.dataset)["train"].features["label"].num_classes
    seen, unseen = range(num_classes // 2), range(num_classes // 2, num_classes)
    training_images = load_data(options.dataset, classes=seen, limit=options.limit)["train"]
    probe_images = load_data(options.dataset, classes=unseen, limit=options.limit)

    seeds = range(options.seed, options.seed + options.members)
    ensemble = assemble([train_member(accelerator, training_images, options, seed) for seed in seeds])
    if accelerator.is_main_process:
        ensemble.save_pretrained(options.output)

    table = extract_features(ensemble, probe_images, quiet=True)
    if accelerator.is_main_process:
        for k in range(options.members):
            print(f"member {k} alone: {100 * probe(table.members([k])):.1f}% of the unseen classes' test images")
        print(f"{options.members} members concatenated: {100 * probe(table):.1f}%, saved in {options.output}")


if __name__ == "__main__":
    main()
