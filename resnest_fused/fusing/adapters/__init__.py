"""One file for each kind of peer, and the list of them; a new peer is a file and an entry here."""

from resnest_fused.fusing.adapters import official, openmmlab, ours, pytorchcv, timm

ADAPTERS = (ours.ADAPTER, official.ADAPTER, timm.ADAPTER, openmmlab.ADAPTER, pytorchcv.ADAPTER)
