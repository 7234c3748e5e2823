"""Accuracy of a linear probe on few images, and after LoRA fine-tuning on the same images from that probe's head.

    .venv/bin/python tests/benchmarks/lora.py ENSEMBLE --layers conv_pw conv_pwl --images 200 --repeats 3

--layers are the names of layers that get an adapter, as in PEFT's `target_modules`. Each repeat takes other images for
training and for the test. The adapter is trained with transformers' Trainer, saved alone and loaded again with its
base; the script stops unless the loaded model gives the same logits bit for bit. Prints the sizes of the adapter's
file and of the base's, and top-1 on the test images before and after with the paired difference in points and its 95%
interval, for each repeat and for their mean.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from concat_ensemble import ConcatEnsembleImageProcessor, LinearProbe, extract_features, load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.probes.intervals import paired_difference
from concat_ensemble.studies.ensembles import load_ensemble
from concat_ensemble.studies.probing import with_head


def to_examples(split: Dataset, processor: ConcatEnsembleImageProcessor) -> list[dict]:
    images = [read_image(split, row) for row in range(len(split))]
    pixels = [processor([image], return_tensors="pt")["pixel_values"][0] for image in images]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, split["label"], strict=True)]


@torch.inference_mode()
def predict(model: torch.nn.Module, examples: list[dict]) -> torch.Tensor:
    """(N, `num_labels`) logits."""
    batches = torch.stack([example["pixel_values"] for example in examples]).split(50)
    return torch.cat([model.eval()(batch).logits for batch in batches])


def weights_size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def run(options: argparse.Namespace, seed: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which test images are classified correctly before and after."""
    torch.manual_seed(seed)
    ensemble = load_ensemble(options.ensemble, seed=seed)
    data = load_data(options.dataset, classes=options.classes, seed=seed).shuffle(seed=seed)
    for split, images in (("train", options.images), ("validation", options.images // 4), ("test", options.test)):
        data[split] = data[split].select(range(min(images, len(data[split]))))
    table = extract_features(ensemble, data, store=folder / "features", quiet=True)
    probe = LinearProbe().fit(table["train"], validation=table["validation"])
    with_head(ensemble, probe, table.class_names).save_pretrained(folder / "base")

    model = AutoModelForImageClassification.from_pretrained(folder / "base")
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    train, test = (to_examples(data[split], processor) for split in ("train", "test"))
    labels, before = torch.tensor([example["labels"] for example in test]), predict(model, test)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=options.layers, modules_to_save=["classifier"]))
    arguments = TrainingArguments(
        str(folder / "run"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16,
        learning_rate=options.learning_rate,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    Trainer(model, arguments, train_dataset=train).train()
    model.cpu().save_pretrained(folder / "adapter")
    after, loaded = predict(model, test), AutoModelForImageClassification.from_pretrained(folder / "adapter")
    assert torch.equal(predict(loaded, test), after)
    sizes = f"adapter {weights_size(folder / 'adapter'):.1f} MB, base {weights_size(folder / 'base'):.1f} MB"
    print(f"seed {seed}: {len(train)} images, same logits after loading; {sizes}", flush=True)
    return (before.argmax(dim=1) == labels).numpy(), (after.argmax(dim=1) == labels).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", help="folder or Hub id")
    parser.add_argument("--dataset", default="scattered:digits")
    parser.add_argument("--classes", type=int, nargs="+", help="default: all")
    parser.add_argument("--layers", nargs="+", default=["conv_pw", "conv_pwl"])
    for name, default in (("images", 200), ("test", 500), ("epochs", 5), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    differences = []
    for seed in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            before, after = run(options, seed, Path(folder))
        difference, (low, high), _ = paired_difference(after, before)
        differences.append(100 * difference)
        beside = f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        print(
            f"top-1 of {len(before)}: {100 * before.mean():.1f}, with LoRA {100 * after.mean():.1f}: {beside}",
            flush=True,
        )
    each = ", ".join(f"{difference:+.1f}" for difference in differences)
    print(f"mean difference {mean(differences):+.1f} ({each})")


if __name__ == "__main__":
    main()
