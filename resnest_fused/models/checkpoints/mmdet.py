"""MMDetection's layout of keys: a backbone whose stem is one sequence with its last norm."""

from resnest_fused.models.checkpoints.layout import Layout

LAYOUT = Layout(
    name="mmdet",
    title="MMDetection's",
    mark=r"stem\.0\.weight",
    stem={f"conv1.{index}": f"stem.{index}" for index in (0, 1, 3, 4, 6)} | {"bn1": "stem.7"},
    head=None,
)
