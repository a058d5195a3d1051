"""MMPretrain's layout of keys: stem convolutions with their norms, and the head apart."""

from resnest_fused.models.checkpoints.layout import Layout

LAYOUT = Layout(
    name="mm",
    title="MMPretrain's",
    mark=r"stem\.0\.conv\.",
    stem={
        "conv1.0": "stem.0.conv",
        "conv1.1": "stem.0.bn",
        "conv1.3": "stem.1.conv",
        "conv1.4": "stem.1.bn",
        "conv1.6": "stem.2.conv",
        "bn1": "stem.2.bn",
    },
    prefix="backbone.",
    head="head.fc",
    shifts_shortcuts=True,
)
