"""The table of ops: the arguments, the results, and the shapes of the results.

Each public function below is one op. Its parameters are the op's arguments: single values, or
structs of values, which the op takes in order. Its return type names the results. Its body
is the op's fake kernel: it makes results of the right shape, dtype and strides, without data.

Everything that knows an op's signature reads it here: the schemas, the C++ structs
(``csrc/generate_ops.py``), the autograd Functions, the FLOP formulas and the Triton backend.
"""

# No deferred annotations: the table is built from them.
import inspect
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

# --- structs of arguments

_DIFFERENTIABLE, _MUTATED = "differentiable", "mutated"
Differentiable = Annotated[Tensor, _DIFFERENTIABLE]
OptionalDifferentiable = Annotated[Tensor | None, _DIFFERENTIABLE]
OptionalMutated = Annotated[Tensor | None, _MUTATED]


class MapArguments(NamedTuple):
    """The feature map, and whether a ReLU follows; after bn0 one always does."""

    x: Differentiable  # (B, R*C, H, W), radix-major
    relu: bool
    radix: int

    @property
    def channels(self) -> int:
        """C, the channels of the output."""
        return self.x.shape[1] // self.radix


class NormArguments(NamedTuple):
    """A batch normalisation over F features; there is none if it has no statistics."""

    weight: OptionalDifferentiable  # (F)
    bias: OptionalDifferentiable  # (F)
    mean: Tensor | None  # (F)
    var: Tensor | None  # (F), biased
    eps: float
    # Whether to use batch statistics, which an op of all phases computes itself.
    batch_stats: bool


NO_NORM = NormArguments(weight=None, bias=None, mean=None, var=None, eps=0.0, batch_stats=False)


class FcArguments(NamedTuple):
    """The two FCs between the pool and recombine, in `cardinality` groups."""

    fc1_weight: Differentiable  # (I, C/K, 1, 1)
    fc1_bias: OptionalDifferentiable  # (I)
    fc2_weight: Differentiable  # (R*C, I/K, 1, 1), rows in the logits' order
    fc2_bias: OptionalDifferentiable  # (R*C)
    cardinality: int

    @property
    def inter(self) -> int:
        """I, the width between the FCs."""
        return self.fc1_weight.shape[0]


class SavedArguments(NamedTuple):
    """The results of the forward that are saved for the backward."""

    gap: Tensor  # (B, C)
    hidden: Tensor  # (B, I)
    attention: Tensor  # (B, R, C)


class RunningArguments(NamedTuple):
    """A norm's running statistics, and the batch's which they take in; there may be none."""

    running_mean: OptionalMutated  # (F)
    running_var: OptionalMutated  # (F), unbiased
    num_batches_tracked: OptionalMutated  # (), int64
    mean: Tensor | None  # (F)
    var: Tensor | None  # (F), biased
    # The batch's weight; None for 1 / num_batches_tracked, which makes a cumulative average.
    momentum: float | None


NOTHING_RUNS = RunningArguments(None, None, None, None, None, None)

# An op has two norms, so their fields carry the parameter's name: bn0_weight, bn1_weight.
_PREFIXED = (NormArguments, RunningArguments)

# --- results


class TrainResults(NamedTuple):
    """The output, and the saved tensors and statistics in the accumulator's dtype.

    A norm with running statistics leaves its two results here empty.
    """

    out: Tensor  # (B, C, H, W)
    gap: Tensor  # (B, C)
    hidden: Tensor  # (B, I)
    attention: Tensor  # (B, R, C)
    bn0_mean: Tensor  # (R*C)
    bn0_var: Tensor  # (R*C), biased
    bn1_mean: Tensor  # (I)
    bn1_var: Tensor  # (I), biased


class GradientResults(NamedTuple):
    """The gradients of the differentiable arguments; empty if not needed."""

    dx: Tensor
    dbn0_weight: Tensor
    dbn0_bias: Tensor
    dfc1_weight: Tensor
    dfc1_bias: Tensor
    dfc2_weight: Tensor
    dfc2_bias: Tensor
    dbn1_weight: Tensor
    dbn1_bias: Tensor


class StatisticsResults(NamedTuple):
    """The statistics of a map by feature."""

    mean: Tensor  # (F)
    var: Tensor  # (F), biased


class PoolBackwardResults(NamedTuple):
    """The results of the backward's first read of x; sums is empty if there is no ReLU."""

    dattention: Tensor  # (B, R, C)
    sums: Tensor  # (B, 4, R, C): csrc/prologue_sums.h


class PrologueBackwardResults(NamedTuple):
    """The gradients of bn0's parameters, in the accumulator's dtype."""

    dbn0_weight: Tensor  # (R*C)
    dbn0_bias: Tensor  # (R*C)


# --- the table's entries


class Argument(NamedTuple):
    """One argument of an op.

    Attributes:
        name: in the schema.
        kind: its type in the schema's language, such as ``Tensor?``.
        differentiable: whether it may have a gradient.
        mutated: whether the op writes into it.
    """

    name: str
    kind: str
    differentiable: bool
    mutated: bool

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, or may be one."""
        return self.kind.startswith("Tensor")


class Parameter(NamedTuple):
    """One parameter of an op's function: a single argument, or a struct of them."""

    name: str
    struct: type[Any] | None
    arguments: tuple[Argument, ...]


_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
    list[bool]: "bool[]",
}


class Op:
    """An op, read off the function that is its fake kernel.

    Attributes:
        name: without the namespace.
        fake: the function.
        parameters: its parameters.
        arguments: of all parameters, in the order of the schema.
        results: the names of the results; none where there is a single tensor, or nothing.
        returns_nothing: whether the op only writes into its arguments.
        struct_of_results: the type that holds several results, else None.
        differentiable: picks the differentiable arguments from the flat ones, in their order.
        tensors: picks the tensors.
        others: picks all arguments that are not tensors.
        spread: places a value for each differentiable argument as an autograd Function returns
            gradients, with None for all other arguments.
        place: each argument's position, by its name.
        unpack: makes the function's parameters from the flat arguments.
    """

    def __init__(self, fake: Callable[..., Any]) -> None:
        self.name, self.fake = fake.__name__, fake
        signature = inspect.signature(fake)
        self.parameters = tuple(_read(p.name, p.annotation) for p in signature.parameters.values())
        self.arguments = tuple(a for p in self.parameters for a in p.arguments)
        result = signature.return_annotation
        self.returns_nothing = result is None
        self.struct_of_results: type[Any] | None = None if result is Tensor else result
        self.results: tuple[str, ...] = getattr(result, "_fields", ())
        places = range(len(self.arguments))
        of_tensors = [i for i in places if self.arguments[i].is_tensor]
        of_others = [i for i in places if not self.arguments[i].is_tensor]
        self.tensors = _picker(of_tensors)
        self.others = _picker(of_others)
        order = [*of_tensors, *of_others]
        self._merged = _picker([order.index(i) for i in places])
        self._differentiable = [
            (i, a.name) for i, a in enumerate(self.arguments) if a.differentiable
        ]
        of_differentiable = [place for place, _ in self._differentiable]
        self.differentiable = _picker(of_differentiable)
        self.spread = _spreader(of_differentiable, len(self.arguments))
        self.place = {a.name: i for i, a in enumerate(self.arguments)}
        self.unpack = _unpacker(self.parameters)

    @property
    def schema(self) -> str:
        """The schema in PyTorch's language."""
        letters = iter(string.ascii_lowercase)
        arguments = ", ".join(
            f"{_with_alias(a.kind, next(letters)) if a.mutated else a.kind} {a.name}"
            for a in self.arguments
        )
        results = ", ".join(f"Tensor {name}" for name in self.results)
        several = self.returns_nothing or results
        return f"{self.name}({arguments}) -> {f'({results})' if several else 'Tensor'}"

    def merge(self, tensors: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
        """The flat arguments from what ``tensors`` and ``others`` picked."""
        return self._merged((*tensors, *others))

    def needed(self, flags: Sequence[bool]) -> dict[str, bool]:
        """Which differentiable arguments need a gradient, from a flag for each argument."""
        return {name: flags[place] for place, name in self._differentiable}

    def gradients(self, by_name: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """A gradient or None for each argument, as an autograd Function returns them."""
        return tuple([by_name.get(name) for name in self.place])


def _read(name: str, annotation: Any) -> Parameter:
    fields = getattr(annotation, "__annotations__", None)
    if fields is None or not issubclass(annotation, tuple):
        return Parameter(name, None, (_argument(name, annotation),))
    prefix = f"{name}_" if annotation in _PREFIXED else ""
    arguments = tuple(_argument(prefix + field, kind) for field, kind in fields.items())
    return Parameter(name, annotation, arguments)


def _argument(name: str, annotation: Any) -> Argument:
    kind, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    return Argument(name, _KINDS[kind], _DIFFERENTIABLE in marks, _MUTATED in marks)


def _with_alias(kind: str, letter: str) -> str:
    """The kind of a tensor that the op writes into: ``Tensor(a!)?``."""
    return kind.replace("Tensor", f"Tensor({letter}!)")


# The functions below generate code, because it runs at each call. It is fast, and torch.compile
# can trace it, unlike operator.itemgetter.


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Picks the values at these places, as a tuple."""
    return eval(f"lambda args: ({''.join(f'args[{place}], ' for place in places)})")


def _spreader(places: Sequence[int], count: int) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Places values at these of so many places, in a tuple with None elsewhere."""
    values = (f"values[{places.index(i)}]" if i in places else "None" for i in range(count))
    return eval(f"lambda values: ({', '.join(values)},)")


def _unpacker(parameters: Sequence[Parameter]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Makes the parameters from the flat arguments."""
    places = itertools.count()
    made = []
    for parameter in parameters:
        values = ", ".join(f"args[{next(places)}]" for _ in parameter.arguments)
        made.append(f"{parameter.struct.__name__}({values})" if parameter.struct else values)
    return eval(f"lambda args: ({', '.join(made)},)")


TABLE: dict[str, Op] = {}


def _op(fake: Callable[..., Any]) -> Callable[..., Any]:
    TABLE[fake.__name__] = Op(fake)
    return fake


# --- tensors without data


def empty_map(x: Tensor, channels: int) -> Tensor:
    """An uninitialised map of so many channels, otherwise as x."""
    # The kernels' own choice: a map that is both contiguous and channels_last counts as NCHW.
    nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout
    )


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums are computed and stored."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_sums(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of sums."""
    return x.new_empty(shape, dtype=accumulator_dtype(x))


# --- the ops: all phases


@_op
def split_attention(
    map: MapArguments, bn0: NormArguments, fcs: FcArguments, bn1: NormArguments
) -> Tensor:
    """The output, for inference."""
    return empty_map(map.x, map.channels)


@_op
def split_attention_train(
    map: MapArguments, bn0: NormArguments, fcs: FcArguments, bn1: NormArguments
) -> TrainResults:
    """The output, the saved tensors, and the batch statistics."""
    x = map.x
    batch, features = x.shape[:2]
    of_bn0 = features if bn0.batch_stats else 0
    of_bn1 = fcs.inter if bn1.batch_stats else 0
    return TrainResults(
        empty_map(x, map.channels),
        empty_sums(x, batch, map.channels),
        empty_sums(x, batch, fcs.inter),
        empty_sums(x, batch, map.radix, map.channels),
        *(empty_sums(x, size) for size in (of_bn0, of_bn0, of_bn1, of_bn1)),
    )


@_op
def split_attention_backward(
    dout: Tensor,
    map: MapArguments,
    bn0: NormArguments,
    fcs: FcArguments,
    bn1: NormArguments,
    saved: SavedArguments,
    needed: list[bool],
) -> GradientResults:
    """The gradients; the norms contain any batch statistics."""
    x, inter, features = map.x, fcs.inter, map.x.shape[1]
    wanted = dict(zip(GradientResults._fields, needed, strict=True))

    def gradient(is_needed: bool, like: Tensor | None, *shape: int) -> Tensor:
        return (x if like is None else like).new_empty(shape if is_needed else (0,))

    return GradientResults(
        dx=empty_map(x, features) if wanted["dx"] else x.new_empty(0),
        dbn0_weight=gradient(wanted["dbn0_weight"], bn0.weight, features),
        dbn0_bias=gradient(wanted["dbn0_bias"], bn0.bias, features),
        dfc1_weight=gradient(wanted["dfc1_weight"], fcs.fc1_weight, *fcs.fc1_weight.shape),
        dfc1_bias=gradient(wanted["dfc1_bias"], fcs.fc1_weight, inter),
        dfc2_weight=gradient(wanted["dfc2_weight"], fcs.fc2_weight, *fcs.fc2_weight.shape),
        dfc2_bias=gradient(wanted["dfc2_bias"], fcs.fc2_weight, features),
        dbn1_weight=gradient(wanted["dbn1_weight"], bn1.weight, inter),
        dbn1_bias=gradient(wanted["dbn1_bias"], bn1.bias, inter),
    )


# --- the ops: one phase each, for any modules between the pool and recombine


@_op
def batch_statistics(x: Tensor) -> StatisticsResults:
    """Mean and variance of x by feature."""
    return StatisticsResults(empty_sums(x, x.shape[1]), empty_sums(x, x.shape[1]))


@_op
def pool(map: MapArguments, bn0: NormArguments) -> Tensor:
    """gap (B, C)."""
    return empty_sums(map.x, map.x.shape[0], map.channels)


@_op
def recombine(map: MapArguments, bn0: NormArguments, attention: Differentiable) -> Tensor:
    """The output, from the attention (B, R, C)."""
    return empty_map(map.x, map.channels)


@_op
def pool_backward(dout: Tensor, map: MapArguments, bn0: NormArguments) -> PoolBackwardResults:
    """The first read of the backward."""
    x, radix = map.x, map.radix
    sums = (x.shape[0], 4, radix, map.channels) if map.relu else (0,)
    return PoolBackwardResults(empty_sums(x, x.shape[0], radix, map.channels), empty_sums(x, *sums))


@_op
def prologue_backward(
    sums: Tensor, attention: Tensor, dgap: Tensor, pixels: int
) -> PrologueBackwardResults:
    """bn0's gradients from the sums over a sample's pixels."""
    features = sums.shape[2] * sums.shape[3]
    return PrologueBackwardResults(sums.new_empty(features), sums.new_empty(features))


@_op
def recombine_backward(
    dout: Tensor,
    map: MapArguments,
    bn0: NormArguments,
    attention: Tensor,
    dgap: Tensor,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
) -> Tensor:
    """dx; the means of dz and dz * xhat (R*C) are given if bn0 uses batch statistics."""
    return empty_map(map.x, map.x.shape[1])


# --- the op after a forward with batch statistics


@_op
def update_running_statistics(x: Tensor, bn0: RunningArguments, bn1: RunningArguments) -> None:
    """running = (1 - momentum) running + momentum batch, with the unbiased variance.

    bn0's batch statistics are over all of x but its features, bn1's over x's batch. Over no
    elements there are none, and the running ones stay. num_batches_tracked is counted up first.
    """
