"""Classes of packages that the tests do not install, found where those packages define them."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FROZEN_NORM = '''
import torch

class FrozenBatchNorm2d(torch.nn.Module):
    """Buffers only, and an eps; computes what batch normalisation with running statistics does."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("weight", torch.randn(features))
        self.register_buffer("bias", torch.randn(features))
        self.register_buffer("running_mean", torch.randn(features))
        self.register_buffer("running_var", torch.rand(features) + 0.5)
        self.eps = 1e-3

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
'''

DETECTRON2_CONV = '''
import torch

class Conv2d(torch.nn.Conv2d):
    """A convolution that may have a norm and an activation behind it, as keyword arguments."""

    def __init__(self, *args, norm=None, activation=None, **options):
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        options = self.stride, self.padding, self.dilation, self.groups
        x = torch.nn.functional.conv2d(x, self.weight, self.bias, *options)
        for after in (self.norm, self.activation):
            x = x if after is None else after(x)
        return x
'''


def define(module: str, source: str) -> ModuleType:
    """Make a module of this name from its source, as if its package were imported."""
    made = ModuleType(module)
    exec(compile(source, f"{module}.py", "exec"), vars(made))
    sys.modules[module] = made
    return made


FrozenBatchNorm2d = define("detectron2.layers.batch_norm", FROZEN_NORM).FrozenBatchNorm2d


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name}")

        return called


def stub_mmcv() -> None:
    """Stand in for MMCV's compiled functions, which backbones import and do not call.

    It must be done before anything of MMCV is imported.
    """
    if "mmcv._ext" not in sys.modules:
        stub = sys.modules["mmcv._ext"] = _Stub("mmcv._ext")
        stub.__spec__ = ModuleSpec("mmcv._ext", None)
