"""The official package's layout of keys, which timm's ResNeSts and this package's share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from resnest_fused.models.checkpoints.layout import Layout

LAYOUT = Layout(
    name="official",
    title="the official",
    mark=r"layer1\.0\.conv2\.(?:bn0|weight)",
    # MMPretrain's around its backbones: FusedResNeSt, and timm's.
    outer_head="head.fc",
)


def num_classes(state: Mapping[str, Tensor]) -> int | None:
    """How many classes the classifier in a state_dict knows; None if it has no such classifier.

    Example::

        num_classes(models.resnest50(num_classes=10).state_dict())  # 10
    """
    weight = state.get("fc.weight")
    return len(weight) if weight is not None and weight.dim() == 2 and len(weight) else None


def adapt_input(state: Mapping[str, Tensor], in_chans: int) -> dict[str, Tensor]:
    """A state_dict whose first convolution takes another number of input channels.

    One channel gets the sum of the weights, as grey pictures have three equal channels. More get
    them in turn, and all are scaled by the old number of channels over the new one.

    Example::

        state = adapt_input(torch.load("resnest50.pth"), 4)
    """
    state = dict(state)
    name = next((key for key in ("conv1.0.weight", "conv1.weight") if key in state), None)
    if name is None or state[name].dim() != 4 or state[name].shape[1] == in_chans:
        return state
    weight = state[name]
    channels = weight.shape[1]
    if in_chans == 1:
        state[name] = weight.sum(dim=1, keepdim=True)
    else:
        turns = -(-in_chans // channels)
        state[name] = weight.repeat(1, turns, 1, 1)[:, :in_chans] * (channels / in_chans)
    return state
