"""Train K networks separately for T / K steps each, concatenate them, and probe the ensemble beside its first member.

    accelerate launch examples/train_members.py --members 4 --total-steps 200

It writes `members/K` (timm's own layout) for each network and `ensemble`, which `AutoModel.from_pretrained` loads.
This page has the whole flow and nothing else. Resuming, logs, evaluations, recipes, and one network that is trained
for all T steps to compare with are in training/pretrain_members.py.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import Dataset, Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from concat_ensemble import LinearProbe, assemble, extract_features, load_data
from concat_ensemble.files import without_folders
from concat_ensemble.members.origins import remove_origin
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train members separately, concatenate them, and probe them.")
    parser.add_argument("--dataset", default="digits", help="any name that concat_ensemble.load_data takes")
    parser.add_argument("--architecture", default="resnet10t", help="name of a timm model")
    parser.add_argument("--image-size", type=int, default=32, help="side that images are resized to, in pixels")
    parser.add_argument("--members", type=int, default=4, help="number of networks, K")
    parser.add_argument("--total-steps", type=int, default=200, help="steps of all networks together, T")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step, on all processes together")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="highest learning rate of the schedule")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: accelerate launch's")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="member k has the seed SEED + k")
    parser.add_argument("--output", type=Path, default=Path("runs/train_members"), help="a folder that all see")
    args = parser.parse_args()
    if not 1 <= args.members <= args.total_steps:
        parser.error(f"--members {args.members} must be from 1 to --total-steps {args.total_steps}")
    return args


def train_member(
    number: int, args: argparse.Namespace, accelerator: Accelerator, dataset: Dataset, folder: Path
) -> None:
    """Train one network, and save it in timm's own layout."""
    # Each member has its own initial weights, order of the images, and crops.
    seed, steps = args.seed + number, args.total_steps // args.members
    set_seed(seed)

    classes = dataset.features["label"].names
    model = timm.create_model(args.architecture, num_classes=len(classes))

    # The size, mean and standard deviation that `save_for_hf` writes beside the weights, so that the ensemble later
    # prepares images in the same way. Images are not flipped, since a flipped digit is no digit.
    size = {"input_size": (3, args.image_size, args.image_size), "crop_pct": 1.0}
    data_config = resolve_data_config(size, model=model)
    transform: Any = create_transform(**data_config, is_training=True, scale=(0.5, 1.0), hflip=0, color_jitter=0)

    def prepare_images(batch: dict) -> dict:
        return {
            "pixel_values": [transform(convert_image(image, "RGB")) for image in batch["image"]],
            "label": batch["label"],
        }

    # As many full batches as there are steps, each epoch in a new order.
    images: Any = dataset.cast_column("image", Image()).with_transform(prepare_images)
    sampler = RandomSampler(images, num_samples=steps * args.batch_size)
    dataloader = DataLoader(images, batch_size=args.batch_size, sampler=sampler)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.learning_rate, total_steps=steps)
    model, optimizer, dataloader, scheduler = accelerator.prepare(model, optimizer, dataloader, scheduler)

    model.train()
    for step, batch in enumerate(dataloader, 1):
        loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["label"])
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == steps:
            accelerator.print(f"member {number}: {steps} steps, loss of the last batch {loss.item():.3f}")

    if accelerator.is_main_process:
        network = accelerator.unwrap_model(model)
        remove_origin(network)  # timm's tag and license, which are those of its pretrained weights
        provenance = {
            "source": "trained by examples/train_members.py",
            "objective": "supervised classification",
            "pretraining_data": without_folders(args.dataset),
            "steps": steps,
            "seed": seed,
        }
        model_config = {"label_names": classes, "provenance": provenance}
        save_for_hf(network, str(folder), model_config, data_config=data_config, safe_serialization=True)
    accelerator.free_memory()


def main() -> None:
    args = parse_arguments()
    # A batch is shared by the processes, so that a step is the same work however many there are.
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    # Splits train, validation and test. The first process of a machine downloads what is not there yet.
    with accelerator.local_main_process_first():
        data = load_data(args.dataset, seed=args.seed)

    folders = [args.output / "members" / str(k) for k in range(args.members)]
    for k, folder in enumerate(folders):
        train_member(k, args, accelerator, data["train"], folder)
    accelerator.wait_for_everyone()  # until the last member is saved

    ensemble = assemble(folders)
    if accelerator.is_main_process:
        ensemble.save_pretrained(args.output / "ensemble")

    # Each process extracts the features of its share of the images, and gets the whole table.
    table = extract_features(ensemble, data, device=accelerator.device)
    if accelerator.is_main_process:
        first = table.members([0])
        for name, features in {"first member alone": first, f"{args.members} members concatenated": table}.items():
            probe = LinearProbe().fit(features["train"], validation=features["validation"])
            accuracy = 100 * probe.score(features["test"])
            print(f"{name}: {features['test'].num_features:,} features, accuracy on the test split {accuracy:.1f}%")
    accelerator.end_training()


if __name__ == "__main__":
    main()
