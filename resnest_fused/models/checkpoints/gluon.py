"""The official Gluon code's layout of keys: MXNet's names of the norms' tensors, no counters."""

from resnest_fused.models.checkpoints.layout import Layout

LAYOUT = Layout(
    name="gluon",
    title="Gluon's",
    mark=r"layer1\.0\.conv2\.bn\.",
    block={"conv2.bn0": "conv2.bn"},
    norm_tensors={"weight": "gamma", "bias": "beta"},
)
