"""An ensemble as one file that runs without this package: ONNX, or a program of `torch.export`.

Both take `pixel_values` as the ensemble's image processor makes them, in batches of any size, and give what the model
gives as a tuple: (pooler_output,), or with a head (logits, pooler_output).
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel

TOLERANCE = 1e-4  # of the largest output, or of 1 where that is smaller
EXAMPLE, OTHERS = 2, (1, 5)  # images in the batch that is traced, and in those that are checked
DYNAMIC = {"pixel_values": {0: torch.export.Dim("batch")}}


def load_for_export(folder: str | os.PathLike) -> nn.Module:
    """The ensemble that was saved in `folder`, in float32, with its head if it has one.

    Raises:
        ValueError: when the folder holds no ensemble.
    """
    there = (Path(folder) / "config.json").is_file()
    config = ConcatEnsembleConfig.from_pretrained(folder) if there else ConcatEnsembleConfig()
    if not config.members:
        raise ValueError(
            f"{folder} holds no ensemble (no members in config.json); make one with concat-ensemble build."
        )
    has_head = ConcatEnsembleForImageClassification.__name__ in (config.architectures or ())
    model_class = ConcatEnsembleForImageClassification if has_head else ConcatEnsembleModel
    return model_class.from_pretrained(folder, config=config, dtype=torch.float32)


class _Positional(nn.Module):
    """The model as a function of `pixel_values` alone that returns a tuple: an output class would have to be there
    where the file is read.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model(pixel_values, return_dict=False)


def export_onnx(model: nn.Module, path: str | os.PathLike, *, check: bool = True) -> Path:
    """Write an ensemble as an ONNX file, its weights inside (beside it, as `<name>.data`, from 1.5 GB on). The file's
    metadata hold the configuration as JSON, with each member's preprocessing and the classes' names.

    Args:
        model: An ensemble with or without a head, on the CPU in evaluation mode and float32.
        path: File to write; what is there stays until the new one is checked.
        check: Compare what ONNX Runtime makes of it with PyTorch, on random batches of other sizes than was traced.

    Raises:
        ValueError: where the extra `export` is not installed, for a model in another state than this or one that cannot
            be exported, and for outputs further than 1e-4 from PyTorch's, relative to the largest.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (what torch exports with)
    except ImportError as error:
        raise ValueError(f"ONNX needs more ({error}); pip install 'concat-ensemble[export]'.") from error

    def write(module: _Positional, pixels: torch.Tensor, file: Path) -> None:
        names = ["logits", "pooler_output"][-len(module(pixels)) :]
        try:
            program = torch.onnx.export(
                module,
                (pixels,),
                dynamic_shapes=DYNAMIC,
                input_names=["pixel_values"],
                output_names=names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"this ensemble has no ONNX form: {first_line(error)}") from error
        program.model.metadata_props["config"] = model.config.to_json_string(use_diff=False)
        program.save(file)

    def read(file: Path) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda pixels: [torch.from_numpy(out) for out in session.run(None, {"pixel_values": pixels.numpy()})]

    return _export(model, Path(path), write, read, check)


def export_program(model: nn.Module, path: str | os.PathLike, *, check: bool = True) -> Path:
    """Write an ensemble as a program that `torch.export.load(path).module()` runs, with PyTorch alone; AOTInductor
    compiles it further. Arguments and errors are those of `export_onnx`, without the extra.
    """

    def write(module: _Positional, pixels: torch.Tensor, file: Path) -> None:
        try:
            program = torch.export.export(module, (pixels,), dynamic_shapes=DYNAMIC)
        except RuntimeError as error:
            raise ValueError(f"torch.export cannot take this ensemble: {first_line(error)}") from error
        torch.export.save(program, file)

    return _export(model, Path(path), write, lambda file: torch.export.load(file).module(), check)


@torch.no_grad()
def _export(model: nn.Module, path: Path, write: Callable, read: Callable, check: bool) -> Path:
    """Write into a folder beside `path`, check, and rename."""
    if model.training:
        raise ValueError("the model is in training mode; call eval() before exporting it.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            f"the model is {model.dtype} on {model.device}; export it in float32 from the CPU: model.float().cpu()."
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file.")
    module, generator = _Positional(model).eval(), torch.Generator().manual_seed(0)

    def random(images: int) -> torch.Tensor:
        return torch.rand(images, *model.config.pixel_shape, generator=generator)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        aside = Path(folder) / path.name
        write(module, random(EXAMPLE), aside)
        if check:
            _check(read(aside), module, map(random, OTHERS))
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the one that names the other comes last
            file.replace(path.with_name(file.name))
    return path


def _check(exported: Callable, module: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    for pixels in batches:
        for got, wanted in zip(exported(pixels), module(pixels), strict=True):
            far, most = (got - wanted).abs().max(), TOLERANCE * wanted.abs().max().clamp(min=1)
            if not far <= most:
                raise ValueError(f"the exported model is {far:.1e} from PyTorch's outputs, more than {most:.1e}.")
