"""The computed memory of a training step beside what torch's allocator counts in a real one."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from concat_ensemble.training.memory import RESERVED, _measure_pass, _optimizer_copies, training_memory
from concat_ensemble.training.recipe import NetworkSettings

SETTINGS = NetworkSettings(dataset="digits", architecture="resnet18", input_size=[3, 64, 64])
MIB = 2**20


def allocate_really(architecture: str, num_images: int, size: int, folder: Path, **model_args) -> int:
    """Bytes at the peak of a forward and backward pass on the CPU, beside the network."""
    network = timm.create_model(architecture, num_classes=10, **model_args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        images, labels = torch.randn(num_images, 3, size, size), torch.zeros(num_images, dtype=torch.long)
        cross_entropy(network(images), labels).backward()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(event["Total Allocated"] for event in memory) - before


@pytest.mark.parametrize("num_images", [2, 6])
def test_a_pass_takes_what_the_allocator_says(num_images, tmp_path):
    _, computed = _measure_pass("resnet18", "{}", (3, 64, 64), 10, num_images, precise=True, checkpoints=False)
    assert computed == pytest.approx(allocate_really("resnet18", num_images, 64, tmp_path), rel=0.03)


def memory(num_images: int = 256, num_networks: int = 1, several_devices: bool = False, **changes) -> float:
    settings = dataclasses.replace(SETTINGS, **changes)
    words = {"num_networks": num_networks, "several_devices": several_devices}
    return (training_memory(settings, {}, num_classes=10, num_images=num_images, **words) - RESERVED) / MIB


def test_activations_are_in_proportion_to_the_images():
    assert memory(512) - memory(256) == pytest.approx(memory(1024) - memory(768), rel=0.03)
    assert memory(1) >= 4 * 42, "weights, gradients and the optimizer's two moments: 11 million parameters of 4 bytes"


def test_what_makes_a_training_smaller_and_larger():
    plain = memory()
    assert memory(mixed_precision="bf16") < 0.7 * plain
    assert memory(gradient_checkpointing=True) < 0.9 * plain
    assert memory(ema_decay=0.999) == pytest.approx(plain + 42.7, abs=1)
    assert memory(several_devices=True) == pytest.approx(plain + 42.7, abs=1)
    assert memory(num_networks=2) > plain + 4 * 42, "another network with its gradients and moments"
    assert memory(num_networks=2) < 1.5 * plain, "but the two do not keep their activations at the same time"


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 1), ("adamw", 2), ("schedulefree_adamw", 2), ("lion", 1)])
def test_the_state_of_the_optimizer(optimizer, copies):
    assert _optimizer_copies(dataclasses.replace(SETTINGS, optimizer=optimizer)) == pytest.approx(copies, abs=0.01)
