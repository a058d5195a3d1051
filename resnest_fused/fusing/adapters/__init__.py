"""One file for each kind of peer, and the list of them; a new peer is a file and an entry here."""

from resnest_fused.fusing.adapters import official, ours, timm

# In the order in which reports name them.
ADAPTERS = (ours.ADAPTER, official.ADAPTER, timm.ADAPTER)
