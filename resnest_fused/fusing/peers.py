"""Makes the fused class of a peer's class, for one layout of its parts."""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from resnest_fused import modules
from resnest_fused.children import path_of
from resnest_fused.layout import Layout
from resnest_fused.modules import FusedModule

# Our own modules have public fused classes.
_OURS: dict[str, type[FusedModule]] = {
    "resnest_fused.reference.SplitAttention": modules.FusedSplitAttention,
    "resnest_fused.reference.SplitAttentionConv2d": modules.FusedSplitAttentionConv2d,
}

_OF_MODULES = frozenset({"forward", "backend", *vars(nn.Module())})
_PLAIN = bool | int | float | str | tuple


class PeerAttention(FusedModule):
    """A peer's forward by the fused op, to be mixed into the peer's class, which has the children.

    Pickles hold the peer's class and the layout, from which the fused class is made again.
    """

    # The attributes that each call reads anew, and those of every module.
    _may_change: frozenset[str]

    def __setattr__(self, name: str, value: Any) -> None:
        """Notes that an attribute got another value, which may count in the peer's own forward.

        The proof was for the value that it had. In a block the peer's forward runs anyhow. Private
        attributes are those of frameworks, such as MMEngine's ``_is_init``.
        """
        before = vars(self).get(name, getattr(type(self), name, value))
        stays = before is value or (isinstance(value, _PLAIN) and before == value)
        of_no_forward = name.startswith("_") or isinstance(before, property)
        may_change = stays or of_no_forward or name in self._may_change
        if not may_change and self._layout.within is None:
            vars(self)["_changed_attribute"] = name
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        kind = type(self)
        if "_layout" not in vars(kind) or made[:2] != (copyreg.__newobj__, (kind,)):  # type: ignore[attr-defined]
            return made
        return (_new, (kind.__bases__[-1], self._layout), *made[2:])


def fused_class(original: Any, layout: Layout) -> type[FusedModule]:
    """The class that modules of this class and layout get when they are fused."""
    kinds: list[Any] = [other.kind for other in layout.others]
    forwards = tuple(kind.forward for kind in kinds)
    return _OURS.get(path_of(original)) or _made(original, layout, original.forward, forwards)


# Another one for each forward, since a class may get a new one and be fused once more.
@functools.cache
def _made(
    original: Any, layout: Layout, forward: Any, other_forwards: tuple[Any, ...]
) -> type[PeerAttention]:
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "_unfused_forward": staticmethod(forward),
        "_layout": layout,
        "_other_forwards": other_forwards,
        "_may_change": _OF_MODULES.union(_attributes_of(layout)),
    }
    signature = inspect.signature(forward)
    if "x" not in signature.parameters:
        body["forward"] = _forward_of(signature)
    if layout.r_softmax is not None:
        body["_r_softmax_forward"] = staticmethod(layout.r_softmax.forward)
    return type(f"Fused{original.__name__}", (PeerAttention, original), body)


def _attributes_of(layout: Any) -> Iterator[str]:
    """The module's own attributes from which the paths lead."""
    for part in layout:
        if type(part) is tuple and part != () and isinstance(part[0], str):
            yield part[0]


def _forward_of(signature: inspect.Signature) -> Callable[..., Tensor]:
    """The fused forward whose tensor has another name, by which it may be given."""

    def forward(self: FusedModule, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return FusedModule.forward(self, *signature.bind(self, *args, **kwargs).args[1:])

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _new(original: type[nn.Module], layout: Layout) -> nn.Module:
    """An empty module of the fused class, whose state the pickle brings."""
    return nn.Module.__new__(fused_class(original, layout))
