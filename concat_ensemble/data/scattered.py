"""Images at random places on noisy canvases, a harder version of small datasets such as scikit-learn's digits."""

import hashlib

import numpy as np
import torch
from datasets import Dataset, Features
from torch.nn import functional
from torchvision.transforms import v2

from concat_ensemble.data.columns import read_column
from concat_ensemble.data.images import HASH_COLUMN, encode_image, read_image


class Scatter(v2.Transform):
    """Put each image of a batch at a random place, scale and rotation on a noisy canvas, as in Translated MNIST.

    Maps (B, C, H, W) float images in [0, 1] to (B, C, `size`, `size`) in [0, 1], rounded to 8 bits like stored images.

    Args:
        size: Side of the canvas in pixels.
        scale: Range of an image's side, as a fraction of the canvas.
        degrees: Largest rotation in either direction.
        noise: Standard deviation of the Gaussian noise, as a fraction of white.
        generator: Source of the random numbers; torch's global generator by default.
    """

    def __init__(
        self,
        size: int = 32,
        scale: tuple[float, float] = (0.5, 0.8),
        degrees: float = 15.0,
        noise: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.size, self.scale, self.degrees, self.noise, self.generator = size, scale, degrees, noise, generator

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(len(images), generator=self.generator)

        scale = uniform(*self.scale)
        angle = torch.deg2rad(uniform(-self.degrees, self.degrees))
        shift_x, shift_y = (uniform(-1, 1) * (1 - scale) for _ in range(2))
        # grid_sample needs the place in the image of each pixel of the canvas, so this is the inverse placement:
        # shift, then rotate and enlarge.
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        rows = [cos, sin, -(cos * shift_x + sin * shift_y), -sin, cos, sin * shift_x - cos * shift_y]
        affine = torch.stack(rows, 1).view(-1, 2, 3)
        grid = functional.affine_grid(affine, [len(images), 1, self.size, self.size], align_corners=False)
        placed = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        noisy = placed + self.noise * torch.randn(placed.shape, generator=self.generator)
        return (noisy.clamp(0, 1) * 255).round() / 255


def scatter_split(split: Dataset, kind: str, seed: int, size: int = 32) -> Dataset:
    """Put every image of a split on its own canvas of `size` x `size` pixels.

    The canvas depends on the image's encoded bytes and the seed alone, not on the rest of the split; copies of an
    image get the same canvas, so that an audit finds them. Raises ValueError if the images differ in size; `kind`
    names the split.
    """
    canvases, shape = [], None
    for index in range(len(split)):
        image = np.asarray(read_image(split, index).convert("L"))
        if shape not in (None, image.shape):
            problem = f"scattered: the images of the {kind} split differ in size"
            raise ValueError(f"{problem}; resize them to one size first.")
        shape = image.shape
        digest = hashlib.sha256(split[index]["image"]["bytes"] or image.tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big") ^ seed)
        pixels = torch.from_numpy(image / np.float32(255))
        canvas = Scatter(size, generator=generator)(pixels[None, None])[0, 0]
        canvases.append(encode_image((canvas * 255).round().to(torch.uint8).numpy()))
    others = [name for name in split.column_names if name not in ("image", HASH_COLUMN)]
    columns = {"image": canvases} | {name: read_column(split, name).to_pylist() for name in others}
    return Dataset.from_dict(columns, features=Features({name: split.features[name] for name in columns}))
