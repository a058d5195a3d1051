"""detectron2's layout of keys: a backbone whose norms are children of their convolutions."""

from resnest_fused.models.checkpoints.layout import Layout

LAYOUT = Layout(
    name="d2",
    title="detectron2's",
    mark=r"stem\.conv1_1\.weight",
    stem={
        "conv1.0": "stem.conv1_1",
        "conv1.1": "stem.conv1_1.norm",
        "conv1.3": "stem.conv1_2",
        "conv1.4": "stem.conv1_2.norm",
        "conv1.6": "stem.conv1_3",
        "bn1": "stem.conv1_3.norm",
    },
    block={
        "bn1": "conv1.norm",
        "bn2": "conv2.norm",
        "bn3": "conv3.norm",
        "downsample.1": "shortcut",
        "downsample.2": "shortcut.norm",
    },
    stage=("res", 1),
    prefix="backbone.bottom_up.",
    head=None,
)
