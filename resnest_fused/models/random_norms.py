"""Random parameters for a network's norms, with which results depend on the attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnest_fused.models import images


@torch.no_grad()
def randomize_norms(model: nn.Module, size: int, seed: int) -> None:
    """Give every BatchNorm2d seeded random parameters, and running statistics to match.

    As initialised, a network says little about its attention. Its running statistics are not those
    of its activations. A zero gamma (timm's last norm in a block) hides the attention altogether.

    Here gamma is uniform in [0.5, 1.5], and beta is normal with a standard deviation of 0.2. A
    random picture runs through the network. The running statistics are the mean and variance over
    all features of what reaches the norm, which keeps the differences between features. The network
    is then sensitive to a wrong attention and insensitive to rounding.

    Example::

        model = models.create("resnest50", fused=False)
        randomize_norms(model, 224, seed=0)

    Args:
        model: a network on (B, 3, size, size); left in eval mode.
        size: pixels of the random picture's side.
        seed: of the parameters and of the picture.
    """
    generator = torch.Generator().manual_seed(seed)

    def calibrate(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0])
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(variance)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
            handles.append(module.register_forward_pre_hook(calibrate))
    model.eval()(images.random_images(1, size, seed))
    for handle in handles:
        handle.remove()
