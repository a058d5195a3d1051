"""Measures how far a fused network agrees with its reference: logits, top-5 classes and loss."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_fused.measure.agreement import Check, relative_error

# In float32 1e-5, which is 84 units of rounding; in float64 as many.
_UNITS = 1e-5 / torch.finfo(torch.float32).eps


class TopFive(NamedTuple):
    """The five classes with the largest logits for one input, by both networks.

    Attributes:
        reference: class indices by the reference, best first.
        fused: class indices by the fused network.
        tied: they differ only where the reference's own logits lie within the allowed error.
    """

    reference: list[int]
    fused: list[int]
    tied: bool

    @property
    def passed(self) -> bool:
        """Whether they are the same or differ only between ties."""
        return self.reference == self.fused or self.tied


def check(
    kind: str, reference: Tensor, fused: Tensor, exact: Tensor | None, allowed: float
) -> Check:
    """Compare a fused result with the reference's, or both with ``exact`` when that is given.

    Without ``exact`` they may differ by ``allowed``. With ``exact`` the fused error may be 1.5
    times the reference's plus one unit of rounding, or ``allowed`` if that is more.

    Example::

        check("logits", reference(x), fused(x), None, allowed=1e-5).passed
    """
    dtype = reference.dtype
    if exact is None:
        return Check(kind, "", dtype, None, relative_error(fused, reference), allowed)
    own = relative_error(reference, exact)
    error = relative_error(fused, exact)
    return Check(kind, "", dtype, own, error, max(1.5 * own + torch.finfo(dtype).eps, allowed))


def check_eval(reference: nn.Module, fused: nn.Module, x: Tensor) -> tuple[Check, list[TopFive]]:
    """Agreement of the logits in eval mode; in 16-bit dtypes both are measured against float32.

    Example::

        logits, tops = check_eval(reference, fused, x)
        print(logits, sum(top.passed for top in tops))

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        x: a batch of their input.
    """
    exact = None
    with torch.no_grad():
        logits, fused_logits = reference.eval()(x), fused.eval()(x)
        if _is_narrow(x.dtype):
            exact = copy.deepcopy(reference).float()(x.float())
    allowed = 0.0 if _is_narrow(x.dtype) else _UNITS * torch.finfo(x.dtype).eps
    result = check("logits", logits, fused_logits, exact, allowed)
    # Two networks that each are this far from the same logits can swap classes this much apart.
    gap = 2 * (result.allowed + (result.reference_error or 0)) * logits.double().abs().max()
    return result, [_top_five(a, b, gap) for a, b in zip(logits, fused_logits, strict=True)]


def _is_narrow(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits == 16


def _top_five(logits: Tensor, fused_logits: Tensor, gap: Tensor) -> TopFive:
    count = min(5, len(logits))
    best, fused_best = logits.topk(count).indices, fused_logits.topk(count).indices
    apart = (logits[best].double() - logits[fused_best].double()).abs().max()
    return TopFive(best.tolist(), fused_best.tolist(), bool(apart <= gap))


def check_train(reference: nn.Module, fused: nn.Module, x: Tensor, target: Tensor) -> Check:
    """Agreement of the loss of a training step, in half the dtype's digits.

    Nothing can be said of gradients here. Rounding alone moves a whole network's by percents,
    because normalisation over few samples and the edges of ReLU amplify it. Use
    :func:`resnest_fused.verify` for them. The networks are left as they were, in training mode.

    Example::

        check_train(reference, fused, x, torch.randint(1000, (len(x),))).passed

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        x, target: a batch of input, and of class indices ``(B,)``.
    """
    expected = step(copy.deepcopy(reference.train()), x, target)
    found = step(copy.deepcopy(fused.train()), x, target)
    return check("loss", expected, found, None, torch.finfo(x.dtype).eps ** 0.5)


def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Forward, cross entropy, backward; returns the loss. Gradients start from none.

    Example::

        step(model.train(), torch.randn(4, 3, 224, 224), torch.tensor([1, 2, 3, 4]))
    """
    model.zero_grad(set_to_none=True)
    value = loss(model, x, target)
    value.backward()
    return value.detach()


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The cross entropy of the model's logits, in float32 at least.

    Example::

        loss(model, torch.randn(4, 3, 224, 224), torch.tensor([1, 2, 3, 4])).backward()
    """
    logits = model(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
