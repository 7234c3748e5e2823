"""Memory, speed and probe accuracy of an ensemble in bfloat16 and quantized by torchao, beside float32.

    .venv/bin/python tests/benchmarks/quantized.py ENSEMBLE --dataset scattered:digits --limit 1500

int8 quantizes the weights of `Linear` layers; int8 dynamic their inputs as well, by a scale found for each row. All
four models are loaded from one folder and run in turns in one process. Prints for each the bytes of its weights and
buffers in memory, images per second of its forward pass (median of --repeats, and the slowest and fastest), both with
their ratio to float32, then top-1 of a linear probe on its features, and the paired difference in points with its 95%
interval. Features are extracted anew, each model's into blocks of its own.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModel, PreTrainedModel, TorchAoConfig

from concat_ensemble import LinearProbe, extract_features, load_data
from concat_ensemble.probes.intervals import paired_difference

LOADING = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    "int8 dynamic": {"quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig())},
}


def num_bytes(tensor: Tensor) -> int:
    """A quantized tensor consists of several others."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@torch.inference_mode()
def speeds(models: dict[str, PreTrainedModel], batch_size: int, repeats: int) -> dict[str, list[float]]:
    """Images per second in each repeat, after one that is not counted; the models alternate."""
    results = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            pixels = torch.randn(batch_size, *model.config.pixel_shape, dtype=model.dtype)
            started = time.perf_counter()
            model(pixels)
            if repeat:
                results[name].append(batch_size / (time.perf_counter() - started))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", help="folder or Hub id")
    parser.add_argument("--dataset", default="scattered:digits")
    parser.add_argument("--classes", type=int, nargs="+", help="default: all")
    for name, default in (("limit", 1500), ("batch-size", 16), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    models = {name: AutoModel.from_pretrained(options.ensemble, **how) for name, how in LOADING.items()}
    memory = {name: sum(map(num_bytes, model.state_dict().values())) for name, model in models.items()}
    speed = speeds(models, options.batch_size, options.repeats)
    for name, runs in speed.items():
        share = f"{memory[name] / memory['float32']:.2f} of float32"
        ratio = median(runs) / median(speed["float32"])
        spread = f"[{min(runs):.1f}, {max(runs):.1f}], {ratio:.2f} times float32"
        print(f"{name:12s} {memory[name] / 1e6:6.1f} MB ({share}); {median(runs):.1f} images/s {spread}", flush=True)

    data, correct = load_data(options.dataset, classes=options.classes, limit=options.limit), {}
    with tempfile.TemporaryDirectory() as store:
        for name, model in models.items():
            compute = torch.bfloat16 if name == "bfloat16" else torch.float32
            table = extract_features(model, data, compute=compute, store=Path(store), quiet=True)
            probe = LinearProbe().fit(table["train"], validation=table["validation"])
            correct[name] = probe.predict(table["test"]) == table["test"].labels
            difference, (low, high), _ = paired_difference(correct[name], correct["float32"])
            beside = f"{100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
            print(f"{name:12s} top-1 {100 * correct[name].mean():.2f} of {len(correct[name]):,}: {beside}", flush=True)


if __name__ == "__main__":
    main()
