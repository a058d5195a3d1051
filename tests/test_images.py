"""Pictures as network input, and random weights and input that make attention count."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
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


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (40, 30)).save(path)
    assert images.preprocess(images.read_image(path), 32).shape == (3, 32, 32)


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
