"""The fused modules: drop-in replacements whose parameters and numbers are the reference's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resnest_fused.functional import split_attention
from resnest_fused.reference import BatchNormArgs, SplitAttention, SplitAttentionConv2d


def unsupported_norm(norm: nn.Module | None) -> str | None:
    """Why ``norm`` cannot stand between the FCs of the fused op, or None when it can."""
    if norm is None or type(norm) is nn.Identity:
        return None
    # BatchNorm2d and subclasses that normalise exactly as it does.
    if isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward:
        return None
    return f"expected BatchNorm2d or none between the FCs, got {type(norm).__name__}"


def fused_attention(
    x: Tensor,
    fc1: Any,
    bn1: Any,
    fc2: Any,
    radix: int,
    cardinality: int,
    backend: str,
) -> Tensor:
    """Split attention by the fused op over modules' parameters; bn1 as ``nn.BatchNorm2d``.

    Raises:
        TypeError: when ``bn1`` is a norm that the op does not have.
    """
    bn = None
    if bn1 is not None and type(bn1) is not nn.Identity:
        if type(bn1) is not nn.BatchNorm2d:
            problem = unsupported_norm(bn1)
            if problem is not None:
                raise TypeError(problem)
        bn = _batch_norm_args(bn1)
    out = split_attention(
        x,
        _tensor(fc1, "weight"),
        _tensor(fc1, "bias"),
        _tensor(fc2, "weight"),
        _tensor(fc2, "bias"),
        radix=radix,
        cardinality=cardinality,
        bn1=bn,
        backend=backend,
    )
    # After the call, so that a call that raises leaves the count as it was.
    if bn is not None and _counts_batches(bn1):
        bn1.num_batches_tracked.add_(1)
    return out


def _tensor(module: nn.Module, name: str) -> Any:
    """``module.name`` without the cost of ``nn.Module.__getattr__`` where it is a parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _counts_batches(bn: Any) -> bool:
    return bn.training and bn.track_running_stats and bn.num_batches_tracked is not None


def _batch_norm_args(bn: Any) -> BatchNormArgs:
    """What ``bn``, an ``nn.BatchNorm2d``, would hand to ``F.batch_norm`` in its present mode."""
    training = bn.training
    buffers = bn._buffers
    # Without tracking, running statistics neither take part nor change while training.
    running = not training or bn.track_running_stats
    mean = buffers["running_mean"] if running else None
    if bn.momentum is not None:
        momentum = bn.momentum
    elif _counts_batches(bn):
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0)  # a cumulative average
    else:
        momentum = 0.0
    return BatchNormArgs(
        _tensor(bn, "weight"),
        _tensor(bn, "bias"),
        mean,
        buffers["running_var"] if running else None,
        momentum,
        bn.eps,
        training or mean is None,
    )


class FusedSplitAttention(SplitAttention):
    """:class:`SplitAttention` by one fused op: same arguments, state_dict and results.

    ``(B, radix*channels, H, W)``, radix-major, to ``(B, channels, H, W)`` in the input's dtype and
    memory format. ``bn1`` behaves exactly as ``nn.BatchNorm2d``. Hooks on ``fc1``, ``bn1`` and
    ``fc2`` do not run, as those modules are not called.

    Raises:
        ValueError, TypeError: as :func:`resnest_fused.split_attention`; TypeError for a
            ``norm_layer`` other than ``nn.BatchNorm2d`` and None.
    """

    backend: str = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_norm(self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, radix*channels, H, W)`` to ``(B, channels, H, W)``."""
        modules = self._modules
        return fused_attention(
            x,
            modules["fc1"],
            self.bn1,
            modules["fc2"],
            self.radix,
            self.cardinality,
            self.backend,
        )


class FusedSplitAttentionConv2d(SplitAttentionConv2d):
    """:class:`SplitAttentionConv2d` with its attention fused: same arguments, state_dict, results.

    conv, bn0 and ReLU run as PyTorch modules, then one fused op. See :class:`FusedSplitAttention`.
    """

    backend: str = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_norm(self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, channels, H', W')``."""
        return fused_attention(
            self._prologue(x),
            self.fc1,
            self.bn1,
            self.fc2,
            self.radix,
            self.cardinality,
            self.backend,
        )


def _check_norm(norm: nn.Module | None) -> None:
    problem = unsupported_norm(norm)
    if problem is not None:
        raise TypeError(f"norm_layer: {problem}")
