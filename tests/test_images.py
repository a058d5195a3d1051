"""Pictures as network input, and random weights and input that make attention count."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageOps
from torch import nn

from resnest_fused import models
from resnest_fused.measure import agreement
from resnest_fused.models import images
from resnest_fused.models.random_norms import randomize_norms


def test_preprocess() -> None:
    # A grey frame around a square whose halves are black and white.
    picture = Image.new("RGB", (400, 256), (128, 128, 128))
    picture.paste((0, 0, 0), (88, 16, 200, 240))
    picture.paste((255, 255, 255), (200, 16, 312, 240))
    x = images.preprocess(picture)
    assert x.shape == (3, 224, 224)
    assert x.is_contiguous()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[:, 0, 0], -mean / std)
    torch.testing.assert_close(x[:, -1, -1], (1 - mean) / std)


SQUARES = torch.tensor([[0, 64, 128], [160, 192, 255]], dtype=torch.uint8)
GREY = Image.fromarray(SQUARES.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
DEEP = SQUARES.repeat_interleave(8, 0).repeat_interleave(8, 1).to(torch.int32).numpy() * 257


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode_have_the_same_brightness(
    mode: str, suffix: str, tmp_path: Path
) -> None:
    if (mode, suffix) == ("CMYK", "png"):
        suffix = "jpg"
    path = tmp_path / f"picture.{suffix}"
    picture = Image.fromarray(DEEP.astype("uint16")) if mode == "I;16" else GREY.convert(mode)
    picture.save(path)
    found = images.read_image(path)
    assert found.mode == "RGB"
    off = ImageChops.difference(found, GREY.convert("RGB")).getextrema()
    assert max(high for _, high in off) <= (3 if suffix == "jpg" else 0)


def test_a_photo_is_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF's orientation: to be turned by a quarter, clockwise
    GREY.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert images.read_image(tmp_path / "turned.png").tobytes() == GREY.convert("RGB").tobytes()


def test_the_first_picture_of_an_animation(tmp_path: Path) -> None:
    GREY.save(tmp_path / "a.gif", save_all=True, append_images=[ImageOps.invert(GREY)])
    assert images.read_image(tmp_path / "a.gif").tobytes() == GREY.convert("RGB").tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PPM", "DDS", "SGI", "TIFF", "JPEG"])
def test_damage_of_any_kind_is_named(kind: str, tmp_path: Path) -> None:
    """Pillow's plugins raise errors of many classes, which name no file."""
    path = tmp_path / "damaged"
    GREY.convert("RGB").save(path, kind)
    whole, generator, named = path.read_bytes(), random.Random(0), 0
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[generator.randrange(min(len(whole), 64))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.randrange(len(whole) // 2, len(whole))])
        try:
            images.read_image(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            named += 1
    assert named >= 10


def test_random_input_is_seeded_and_varied() -> None:
    x = images.random_images(4, 32, seed=3)
    assert torch.equal(x, images.random_images(4, 32, seed=3))
    assert not torch.equal(x, images.random_images(4, 32, seed=4))
    crops = images.random_crops(x[:2], 6, seed=0)
    assert crops.shape == (6, 3, 32, 32)
    assert torch.equal(crops, images.random_crops(x[:2], 6, seed=0))
    assert torch.pdist(crops.flatten(1)).min() > 1


def test_randomized_norms_make_attention_count() -> None:
    """Rounding stays far below the allowed error, a small mistake in attention far above it."""
    torch.manual_seed(0)
    model = models.resnest50(fused=False)
    for module in model.modules():  # like timm's new models, in which attention has no influence
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    randomize_norms(model, 64, seed=0)
    x = images.random_images(2, 64, seed=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        logits = model(x)
        model.layer3[1].conv2.fc2.weight.mul_(1.01)
        wrong = model(x)
    assert agreement.relative_error(logits, exact) < 2e-6
    assert agreement.relative_error(wrong, exact) > 1e-4


def test_values_of_32_bits_are_refused(tmp_path: Path) -> None:
    """Whether 1.0 or 255.0 or more is white cannot be told."""
    for mode in ("I", "F"):
        GREY.convert(mode).save(tmp_path / "deep.tif")
        with pytest.raises(ValueError, match=r"deep.tif: expected 8 or 16 bits a value, got 32$"):
            images.read_image(tmp_path / "deep.tif")
