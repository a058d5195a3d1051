"""All options of a training run, described once: for Python, YAML files and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """An option has a wrong value; the message begins with its name."""


def _option(
    default: Any,
    help: str,
    *,
    metavar: str = "N",
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field with what the command line shows of it, and the values that it may have."""
    metadata = {
        "help": help,
        "metavar": "NAME" if choices else metavar,
        "least": least,
        "below": below,
        "most": most,
        "choices": choices,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All options of a training run. The defaults are the published recipe of ResNeSt-50.

    The recipe is that of the paper (arXiv:2004.08955, section 5) and of the Gluon scripts that
    trained the published weights. They ran 64 processes of 128 samples.

    Example::

        config = Config(data="imagenet/", out="runs/resnest50")
        config = read_config("runs/resnest50/config.yaml")

    Raises:
        ConfigError: an option has a wrong value.
    """

    # --- data
    data: str = _option(
        "",
        "A folder with train/ and val/, which have a folder for each class; torchvision:NAME, as "
        "torchvision:CIFAR10, below --root; webdataset:URLS, as train-{000..146}.tar; "
        "scikit-learn's digits; or synthetic.",
        metavar="SOURCE",
    )
    val: str = _option("", "WebDataset's shards to evaluate on.", metavar="URLS")
    root: str = _option("data", "Where torchvision's datasets are kept.", metavar="DIR")
    download: bool = _option(False, "Let torchvision download its dataset.")
    samples: int = _option(0, "Samples in an epoch of shards, or of synthetic ones.", least=0)
    classes: int = _option(0, "Number of classes; 0 for as many as the data have.", least=0)
    strict_data: bool = _option(False, "End at the first picture that cannot be decoded.")
    workers: int = _option(
        4, "Processes that load data, for each process that trains.", least=0, most=1024
    )

    # --- network
    model: str = _option("resnest50", "A name of `resnest-fused models`.", metavar="NAME")
    weights: str = _option(
        "", "Start from a checkpoint of any layout; its classifier only if it fits.", metavar="FILE"
    )
    options: dict[str, Any] = _option(  # noqa: RUF009
        {}, "Further options of the network: radix=4, planes=[16,32,64,128].", metavar="NAME=X"
    )
    fuse: bool = _option(True, "Run each split attention as one op.")
    backend: str = _option("auto", "Whose kernels the op runs.", metavar="NAME")
    dropout: float = _option(0.0, "Dropout in front of the classifier.", least=0, below=1)
    drop_path: float = _option(0.0, "Stochastic depth at the last block.", least=0, below=1)
    drop_block: float = _option(
        0.1,
        "DropBlock's rate at the end, in the last two stages; it grows linearly.",
        least=0,
        below=1,
    )
    zero_gamma: bool = _option(True, "Start each block as its shortcut.")
    frozen_stages: int = _option(
        -1, "Train neither the stem nor the first N stages; -1 for all.", least=-1, most=4
    )
    checkpointing: bool = _option(
        False, "Compute the blocks' insides again in backward instead of keeping them."
    )
    sync_bn: bool = _option(False, "Batch statistics over all processes.")

    # --- pictures
    crop: int = _option(224, "Pixels of the side of training pictures.", least=8)
    eval_crop: int = _option(
        0, "The same for evaluation; 0 for the size that the network was published at.", least=0
    )
    eval_ratio: float = _option(
        0.0,
        "The share of the shorter side that is evaluated; 0 for size/(size+32).",
        least=0,
        most=1,
    )
    least_area: float = _option(
        0.08, "The least share of a picture in a training crop.", least=0.01, most=1
    )
    flip: float = _option(0.5, "How often training pictures are mirrored.", least=0, most=1)
    policy: str = _option(
        "autoaugment",
        "Random changes of pictures: autoaugment, randaugment, trivialaugment or none.",
        choices=("autoaugment", "randaugment", "trivialaugment", "none"),
    )
    jitter: float = _option(0.4, "Change of brightness, contrast and saturation.", least=0, most=1)
    lighting: float = _option(0.1, "Deviation of the PCA lighting.", least=0, most=10)
    smoothing: float = _option(0.1, "Label smoothing.", least=0, below=1)
    mixup: float = _option(0.2, "Alpha of mixup; 0 for none.", least=0, most=100)
    cutmix: float = _option(
        0.0, "Alpha of CutMix; 0 for none. With mixup one of both at random.", least=0, most=100
    )

    # --- optimisation
    epochs: int = _option(270, "Passes over the data.", least=1)
    batch: int = _option(128, "Samples of one process at a time.", least=1)
    accumulate: int = _option(1, "Batches whose gradients make one step.", least=1)
    lr: float = _option(
        0.1, "Learning rate for 256 samples in a step; the peak is LR * samples / 256.", least=0
    )
    warmup: int = _option(
        5, "Epochs in which the learning rate rises from 0; at most all of them.", least=0
    )
    momentum: float = _option(0.9, "Nesterov momentum of SGD.", least=0, below=1)
    weight_decay: float = _option(1e-4, "Of weights, not of norms and biases.", least=0, most=1)
    lr_of: dict[str, float] = _option(  # noqa: RUF009
        {}, "Factors of the learning rate of parts: fc=10.", metavar="PART=X", least=0
    )
    clip: float = _option(0.0, "Largest norm of the gradient; 0 for any.", least=0)
    ema: float = _option(
        0.0, "Decay of the moving average of the weights, which is then evaluated; 0 for none.",
        least=0, below=1,
    )  # fmt: skip

    # --- machine
    device: str = _option("", "cpu or cuda; default the GPU if there is one.", metavar="NAME")
    amp: str = _option(
        "none", "Mixed precision: none, bf16, or fp16, which scales the loss.",
        choices=("none", "bf16", "fp16"),
    )  # fmt: skip
    channels_last: bool = _option(False, "Memory format of pictures and weights.")
    fsdp: bool = _option(False, "Shard weights, gradients and momenta over the processes (FSDP2).")
    compile: bool = _option(False, "Run the network through torch.compile.")
    timeout: int = _option(
        60, "Seconds after which a process that hangs ends the others.", least=5, most=86_400
    )

    # --- run
    out: str = _option("runs/last", "The run's folder. A run that is there goes on.", metavar="DIR")
    seed: int = _option(0, "Of all random numbers.", least=0, below=2**32)
    save_every: int = _option(
        0, "Steps between checkpoints; there is one after each epoch too.", least=0
    )
    keep: int = _option(3, "How many of the last checkpoints are kept, beside the best.", least=1)
    log_every: int = _option(50, "Steps between lines of metrics.jsonl.", least=1)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Config)
        for field in dataclasses.fields(self):
            _check(field, hints[field.name], getattr(self, field.name))
        if self.warmup > self.epochs:
            raise ConfigError(
                f"warmup: expected an integer from 0 to the number of epochs, {self.epochs}, got "
                f"{self.warmup}"
            )


# What says where things are, and how often a run saves and tells. What a run computes is the same
# with any of them, on another device to rounding.
_FREE = frozenset(
    {
        *("data", "val", "root", "download", "out", "device"),
        *("keep", "save_every", "log_every", "timeout"),
    }
)


def may_change(name: str, config: Config) -> bool:
    """Whether an option may be another one when a run goes on."""
    # In shards the order of the samples depends on how many processes read them.
    return name in _FREE or (name == "workers" and not config.data.startswith("webdataset:"))


# What differs from the defaults: of the published networks in the scripts that trained them, and of
# a small one on scikit-learn's handwritten digits, which are not mirrored and not cut much.
PRESETS: dict[str, dict[str, Any]] = {
    "resnest50": {"model": "resnest50"},
    "resnest101": {"model": "resnest101", "batch": 64},
    "resnest200": {"model": "resnest200", "batch": 32, "crop": 256, "dropout": 0.2},
    "resnest269": {"model": "resnest269", "batch": 32, "crop": 320, "dropout": 0.2},
    "digits": {
        "data": "digits",
        "model": "resnest14",
        "options": {"planes": [16, 32, 64, 128], "stem_width": 16},
        "workers": 0,
        "drop_block": 0.0,
        "crop": 32,
        "eval_crop": 32,
        "eval_ratio": 1.0,
        "least_area": 0.6,
        "flip": 0.0,
        "policy": "none",
        "jitter": 0.2,
        "lighting": 0.0,
        "epochs": 30,
        "batch": 32,
        "lr": 0.4,
        "warmup": 3,
        "weight_decay": 5e-4,
        "log_every": 5,
        "out": "runs/digits",
    },
}


def make_config(
    preset: str | None = None,
    file: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Config:
    """The options of a preset, over them those of a YAML file, over them those that are given.

    Example::

        config = make_config("resnest101", options={"data": "imagenet/", "amp": "bf16"})

    Raises:
        ConfigError: there is no such preset or option, a value is wrong, or the file unreadable.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        values |= PRESETS[preset]
    if file is not None:
        values |= _read(Path(file))
    return _from_values(values | dict(options or {}))


def read_config(file: str | Path) -> Config:
    """The options in a YAML file; those that it does not have are the defaults.

    Raises:
        ConfigError: the file is unreadable, or has an option that is wrong or does not exist.
    """
    return make_config(file=file)


def as_yaml(config: Config) -> str:
    """All options, in the form that :func:`read_config` reads."""
    import yaml

    dumper = _with_numbers(yaml.SafeDumper)
    return str(yaml.dump(dataclasses.asdict(config), Dumper=dumper, sort_keys=False))


def parse_yaml(text: str) -> Any:
    """What a text in YAML says.

    Raises:
        yaml.YAMLError: it is none.
    """
    import yaml

    return yaml.load(text, Loader=_with_numbers(yaml.SafeLoader))


def _with_numbers(kind: Any) -> Any:
    """A loader or dumper of yaml's to which 1e-4 is a number, too, as in YAML 1.2."""
    made: Any = type(kind.__name__, (kind,), {})
    number = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
    made.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return made


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {file} cannot be read ({error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config: {file}: expected options by name, got {type(values).__name__}")
    return values


def _from_values(values: Mapping[str, Any]) -> Config:
    names = [field.name for field in dataclasses.fields(Config)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            raise ConfigError(
                f"{name}: no such option" + (f"; did you mean {close[0]}?" if close else "")
            )
    return Config(**values)


# What is said of a type, and what has it. Where a float is wanted an integer is one, too.
_KINDS: dict[Any, tuple[str, type | tuple[type, ...]]] = {
    bool: ("true or false", bool),
    int: ("an integer", int),
    float: ("a number", (int, float)),
    str: ("text", str),
    dict[str, Any]: ("values by name", dict),
    dict[str, float]: ("numbers by name", dict),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(field: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Compare an option's value with its type and with what its field allows."""
    if hint == dict[str, float] and isinstance(value, dict):
        for name, each in value.items():
            _check_value(f"{field.name}: {name}", float, field.metadata, each)
    else:
        _check_value(field.name, hint, field.metadata, value)


def _check_value(name: str, hint: Any, limits: Mapping[str, Any], value: Any) -> None:
    least, below, most = (limits[name] for name in ("least", "below", "most"))
    wanted, kind = _KINDS[hint]
    fits = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
    if limits["choices"]:
        wanted, fits = f"one of {', '.join(limits['choices'])}", value in limits["choices"]
    elif least is not None:
        upper = f"to {most}" if most is not None else f"to below {below}" if below else "on"
        wanted += f" from {least} {upper}"
        fits = fits and _is_number(value) and least <= value
        fits = fits and (most is None or value <= most) and (below is None or value < below)
    if not fits:
        raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
