"""Photos from files, and the official preprocessing that makes them network input."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Of ImageNet's training images, by channel R, G, B, for values in [0, 1].
MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, decoded, upright, in RGB with 8 bits.

    Of an animation the first picture is taken. Transparency is left out.

    Example::

        x = preprocess(read_image("photo.jpg"))[None]

    Raises:
        ValueError: not a file, not a picture that Pillow can read, truncated, too large, or with
            32 bits a value, which may mean any brightness.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"{name}: not a file that exists")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)  # as the camera was held
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that Pillow can read") from error
    except Exception as error:  # a damaged file makes Pillow's plugins raise almost anything
        raise ValueError(f"{name}: cannot be decoded ({error})") from error
    if upright.mode in ("I", "F"):
        raise ValueError(f"{name}: expected 8 or 16 bits a value, got 32")
    if upright.mode.startswith("I;16"):  # Pillow's own conversion cuts all but the darkest off
        upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
    return upright.convert("RGB")


def preprocess(image: Image.Image, size: int = 224, ratio: float | None = None) -> Tensor:
    """An RGB picture as the official verification script feeds it; ``(3, size, size)``, float32.

    The central square with ``ratio`` of the shorter side is resized bicubically, scaled to [0, 1]
    and normalised by ImageNet's mean and standard deviation.

    Example::

        x = preprocess(read_image("photo.jpg"), size=256)[None]

    Args:
        image: the picture.
        size: pixels of the output's side.
        ratio: the share of the shorter side; None for the official size/(size+32).
    """
    width, height = image.size
    side = min(width, height) * (size / (size + 32) if ratio is None else ratio)
    left, top = round((width - side) / 2), round((height - side) / 2)
    # The crop comes first, so that no pixel outside it takes part in the resizing.
    square = image.crop((left, top, round(left + side), round(top + side)))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return ((torch.from_numpy(pixels) / 255 - MEAN) / STD).permute(2, 0, 1).contiguous()


def random_images(count: int, size: int, seed: int) -> Tensor:
    """Seeded smooth colour patterns, normalised like photos; ``(count, 3, size, size)``, float32.

    White noise has the same global average in every picture, so attention would see no difference
    between them.

    Example::

        x = random_images(4, 224, seed=0)
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic")


def random_crops(pictures: Tensor, count: int, seed: int) -> Tensor:
    """``count`` seeded random crops, resized and half of them mirrored, cycling through pictures.

    ``(N, C, H, W)`` to ``(count, C, H, W)``. A crop has half to all of the height and width.

    Example::

        x = random_crops(preprocess(read_image("photo.jpg"))[None], 8, seed=0)
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = pictures.shape[-2:]
    crops = []
    for index in range(count):
        scale, down, right, mirror = torch.rand(4, generator=generator).tolist()
        rows, columns = round(height * (1 + scale) / 2), round(width * (1 + scale) / 2)
        top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
        crop = pictures[index % len(pictures), :, top : top + rows, left : left + columns]
        crop = crop.flip(-1) if mirror < 0.5 else crop
        crops.append(F.interpolate(crop[None], size=(height, width), mode="bilinear"))
    return torch.cat(crops)
