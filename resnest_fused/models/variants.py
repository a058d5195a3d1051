"""The family as one table: what each ResNeSt is made of, and what was published of it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One network of the family.

    Attributes:
        name: as in the official package, or formed like those.
        timm: as in timm, or formed like those.
        layers: blocks in each stage.
        stem_width, radix, cardinality, bottleneck_width, avd_first: as of
            :class:`resnest_fused.models.ResNeSt`.
        size: pixels of the side of the pictures that it is evaluated on.
        parameters: their number, with 1000 classes.
        macs: multiply-adds of the convolutions and the FC for one picture of that size.
        top1: the published accuracy on ImageNet in percent; None where none was published.
        source: where: "official" is the ResNeSt repository, "timm" timm's results table.
    """

    name: str
    timm: str
    layers: tuple[int, int, int, int]
    size: int
    parameters: int
    macs: int
    top1: float | None
    source: str | None
    stem_width: int = 32
    radix: int = 2
    cardinality: int = 1
    bottleneck_width: int = 64
    avd_first: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of :class:`resnest_fused.models.ResNeSt`."""
        names = ("layers", "stem_width", "radix", "cardinality", "bottleneck_width", "avd_first")
        return {name: getattr(self, name) for name in names}


def _fast(
    radix: int, cardinality: int, width: int, parameters: int, macs: int, top1: float
) -> Variant:
    """A network of the paper's ablation: ResNeSt-50 with the pooling in front of the attention."""
    kind = f"{radix}s{cardinality}x{width}d"
    return Variant(
        f"resnest50_fast_{kind}",
        f"resnest50d_{kind}",
        (3, 4, 6, 3),
        224,
        parameters,
        macs,
        top1,
        "official",
        radix=radix,
        cardinality=cardinality,
        bottleneck_width=width,
        avd_first=True,
    )


# The 152 layers are those of MMPretrain's depth 152, with the stem of the other deep networks.
# fmt: off
_TABLE = (
    Variant("resnest14", "resnest14d", (1, 1, 1, 1), 224, 10_611_688, 2_749_405_184, 75.52, "timm"),
    Variant("resnest26", "resnest26d", (2, 2, 2, 2), 224, 17_069_448, 3_623_391_232, 78.48, "timm"),
    Variant(
        "resnest50", "resnest50d", (3, 4, 6, 3), 224, 27_483_240, 5_371_160_576, 81.03, "official"
    ),
    Variant(
        "resnest101", "resnest101e", (3, 4, 23, 3), 256, 48_275_016, 13_321_472_000,
        82.83, "official", stem_width=64,
    ),
    Variant(
        "resnest152", "resnest152e", (3, 8, 36, 3), 256, 65_316_040, 18_171_463_680,
        None, None, stem_width=64,
    ),
    Variant(
        "resnest200", "resnest200e", (3, 24, 36, 3), 320, 70_201_544, 35_519_694_848,
        83.84, "official", stem_width=64,
    ),
    Variant(
        "resnest269", "resnest269e", (3, 30, 48, 8), 416, 110_929_480, 77_348_702_208,
        84.54, "official", stem_width=64,
    ),
    _fast(1, 1, 64, 26_217_896, 4_329_459_712, 80.33),
    _fast(2, 1, 64, 27_483_240, 4_330_711_040, 80.53),
    _fast(4, 1, 64, 31_912_712, 4_335_112_192, 80.76),
    _fast(1, 2, 40, 25_946_680, 4_364_642_816, 80.59),
    _fast(2, 2, 40, 26_943_792, 4_365_622_336, 80.61),
    _fast(4, 2, 40, 30_417_592, 4_369_060_736, 81.14),
    _fast(1, 4, 24, 25_677_000, 4_399_827_456, 80.99),
)
# fmt: on
VARIANTS = {variant.name: variant for variant in _TABLE}
