"""Random calls of split attention, and how the tests run and compare them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import oracle
import torch
from torch import Tensor

import resnest_fused as rf

# The statistics of bn1 and of bn0, if there are these; a prologue may also be a ReLU alone.
NORMS = ("none", "running", "batch")
PROLOGUES = ("none", "relu", "running", "batch")
# What can be differentiated, in the order of the op's arguments.
DIFFERENTIABLE = (
    "x",
    "bn0_weight",
    "bn0_bias",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "bn1_weight",
    "bn1_bias",
)
EPS = 1e-5
# The backend under test; pytest --kernels chooses another.
BACKEND = "native"
# Each backend's namespace of ops.
NAMESPACES = {"native": "resnest_fused", "triton": "resnest_fused_triton"}
# out, and gradients by name.
Results = tuple[Tensor, dict[str, Tensor]]


def _unaligned(tensor: Tensor) -> Tensor:
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


# Each gives a dense NCHW tensor other strides; the expanded ones repeat values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "unaligned": _unaligned,
    "unaligned_channels_last": lambda t: _unaligned(
        t.contiguous(memory_format=torch.channels_last)
    ),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every_other_column": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "some_channels": lambda t: torch.cat((t, t), dim=1)[:, : t.shape[1]],
    "batch_last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded_pixels": lambda t: t[..., :1].expand(t.shape),
    "expanded_batch": lambda t: t[:1].expand(t.shape),
}
# The gradient that ``out.sum()`` sends back is one number, expanded.
DOUT_LAYOUTS = LAYOUTS | {"sum": lambda t: t.new_ones(()).expand(t.shape)}


@contextlib.contextmanager
def fill_memory() -> Iterator[Callable[[int], None]]:
    """Give a function that sets the byte with which glibc fills memory, until the block ends.

    glibc fills allocated memory with the byte, and freed memory with its complement.
    """
    perturb = -6  # M_PERTURB of malloc.h
    mallopt = ctypes.CDLL(None).mallopt

    def fill(byte: int) -> None:
        assert mallopt(perturb, byte ^ 0xFF)
        assert (torch.empty(5000, dtype=torch.uint8) == byte).all()

    try:
        yield fill
    finally:
        mallopt(perturb, 0)


@dataclass(frozen=True)
class Case:
    """One call: its sizes, dtypes, strides and normalisations."""

    batch: int
    channels: int
    height: int
    width: int
    radix: int = 2
    cardinality: int = 1
    inter: int = 32
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    layout: str = "nchw"
    dout_layout: str = "nchw"
    bias: bool = True
    norm: str = "batch"
    affine: bool = True
    prologue: str = "none"

    @property
    def has_bn0(self) -> bool:
        return self.prologue in ("running", "batch")

    def __str__(self) -> str:
        parts = [
            f"{self.batch}x{self.channels}@{self.height}x{self.width}",
            f"R{self.radix}K{self.cardinality}I{self.inter}",
            str(self.dtype).removeprefix("torch."),
            f"params_{self.param_dtype}".replace("torch.", "") if self.param_dtype else "",
            "" if self.layout == "nchw" else self.layout,
            "" if self.dout_layout == "nchw" else f"dout_{self.dout_layout}",
            "" if self.bias else "no_bias",
            {"none": "", "relu": "relu"}.get(self.prologue, f"bn0_{self.prologue}"),
            self.norm,
            "not_affine" if not self.affine and (self.has_bn0 or self.norm != "none") else "",
        ]
        return "-".join(part for part in parts if part)


@dataclass
class Call:
    """A case with its tensors; ``params`` are named as in ``oracle.split_attention``."""

    case: Case
    x: Tensor
    params: dict[str, Tensor]
    dout: Tensor

    def tensor(self, name: str) -> Tensor:
        return self.x if name == "x" else self.params[name]

    def differentiable(self) -> list[str]:
        return [name for name in DIFFERENTIABLE if name == "x" or name in self.params]

    @functools.cached_property
    def truth(self) -> oracle.Truth:
        return self.evaluate(self.dout)

    @property
    def exact(self) -> type[np.floating]:
        """A dtype whose rounding is nothing beside that of the call's."""
        dtypes = {tensor.dtype for tensor in (self.x, *self.params.values())}
        return np.longdouble if torch.float64 in dtypes else np.float64

    def evaluate(
        self,
        dout: Tensor | None = None,
        dtype: type[np.floating] | None = None,
        affine: bool = False,
    ) -> oracle.Truth:
        """The true out and, if dout is given, gradients; in a narrower dtype, with its rounding."""
        case = self.case
        return oracle.split_attention(
            self.x,
            self.params,
            radix=case.radix,
            cardinality=case.cardinality,
            norm=case.norm,
            prologue=case.prologue,
            eps=EPS,
            dout=dout,
            dtype=self.exact if dtype is None else dtype,
            affine=affine,
        )

    def loop(self, names: Iterable[str] | None = None, affine: bool = False) -> Results:
        """:meth:`gradients` as plain loops compute them, with the same bits on every CPU.

        The oracle's formulas run in the accumulator's dtype, and results are rounded at the end.
        ``affine`` computes bn0 as PyTorch and the kernels do on a CPU without FMA.
        """
        wide = np.float64 if self.case.dtype == torch.float64 else np.float32
        values = self.evaluate(self.dout, wide, affine).values
        results = {
            name: torch.as_tensor(values[name].astype(wide), device=self.x.device).to(
                (self.x if name == "out" else self.tensor(name)).dtype
            )
            for name in ("out", *(self.differentiable() if names is None else names))
        }
        return results.pop("out"), results

    def to(self, dtype: torch.dtype) -> Call:
        """The same values in another dtype."""
        params = {name: tensor.to(dtype) for name, tensor in self.params.items()}
        return Call(self.case, self.x.to(dtype), params, self.dout.to(dtype))

    def reversed(self) -> Call:
        """The same call with samples and pixels in reverse."""
        return Call(self.case, self.x.flip(0, 2, 3), self.params, self.dout.flip(0, 2, 3))

    def in_reverse(self, evaluate: Callable[[Call], Results]) -> Results:
        """The results of ``evaluate`` for the reversed call, in this call's order."""
        out, grads = evaluate(self.reversed())
        if "x" in grads:
            grads["x"] = grads["x"].flip(0, 2, 3)
        return out.flip(0, 2, 3), grads

    def samples(self, start: int, stop: int) -> Call:
        """The same call for some of the samples."""
        return Call(self.case, self.x[start:stop], self.params, self.dout[start:stop])

    def forward(self, backend: str | None = None, **replaced: Tensor) -> Tensor:
        """``rf.split_attention`` of these tensors; the running statistics stay as they are."""
        case, p = self.case, self.params | replaced

        def batch_norm(name: str, batch_stats: bool) -> rf.BatchNormArgs | None:
            if f"{name}_running_mean" not in p:
                return None
            running = [p[f"{name}_running_{statistic}"].clone() for statistic in ("mean", "var")]
            affine = p.get(f"{name}_weight"), p.get(f"{name}_bias")
            return rf.BatchNormArgs(*affine, *running, eps=EPS, batch_stats=batch_stats)

        return rf.split_attention(
            p.get("x", self.x),
            p["fc1_weight"],
            p.get("fc1_bias"),
            p["fc2_weight"],
            p.get("fc2_bias"),
            radix=case.radix,
            cardinality=case.cardinality,
            bn0=batch_norm("bn0", case.prologue == "batch"),
            bn1=batch_norm("bn1", case.norm == "batch"),
            relu=case.prologue == "relu",
            backend=BACKEND if backend is None else backend,
        )

    def gradients(self, backend: str | None = None, names: Iterable[str] | None = None) -> Results:
        """out, and the gradients of the named tensors (of all that there are if None)."""
        names = self.differentiable() if names is None else list(names)
        leaves = {name: self.tensor(name).detach().requires_grad_() for name in names}
        out = self.forward(backend, **leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), self.dout) if names else ()
        return out.detach(), dict(zip(names, grads, strict=True))


def draw(case: Case) -> Call:
    """:func:`draw_any` without elements and hidden features that amplify rounding.

    At a ReLU's edge the gradient jumps, and one rounding decides on which side a call falls.
    Normalisation by a tiny variance magnifies every earlier rounding.
    """
    call = draw_any(case)
    if case.batch == 0:
        return call
    for mend in (_mend_x, _mend_hidden):
        for _ in range(20):
            if not mend(call):
                break
        else:
            return draw(case)  # few pixels, or few features in a group, may leave no good values
    return call


def _mend_x(call: Call) -> bool:
    """Move x away from the edge of the prologue's ReLU, and redraw features that hardly vary.

    False if there was nothing to move. A move changes the feature's batch statistics a little.
    """
    case = call.case
    if case.prologue == "none":
        return False
    before, bn0 = oracle.prologue_input(call.x, call.params, case.prologue, EPS, call.exact)
    size = np.abs(before)
    # Wide enough for finite differences and for the rounding of statistics. Rounding to 16 bits in
    # front of the ReLU changes no sign.
    near = size < 1e-4 * size.max(axis=(0, 2))[:, None]
    moved = torch.as_tensor(near, device=call.x.device).view(call.x.shape)
    # More than half of the distance between neighbouring bfloat16 numbers below 8, so that rounding
    # does not undo the move.
    others = call.x + 1 / 32
    if case.prologue == "batch" and (flat := _small(bn0.var)).any():
        moved = moved | torch.as_tensor(flat, device=call.x.device)[:, None, None]
        others = draw_any(case).x
    call.x = LAYOUTS[case.layout](torch.where(moved, others, call.x))
    return bool(moved.any())


def _mend_hidden(call: Call) -> bool:
    """Redraw hidden features at the ReLU's edge or of little variance; False if none."""
    truth = call.evaluate()
    # An exact 0, as from features that the prologue's ReLU stops, is 0 in every evaluation.
    size = np.abs(truth.relu_input)
    bad = ((size < 2e-5 * size.max()) & (size > 0)).any(axis=0)
    if call.case.norm == "batch":
        bad |= _small(truth.bn1.var)
    redrawn = torch.as_tensor(bad, device=call.x.device)
    fresh = draw_any(call.case).params if bad.any() else {}
    for name in ("fc1_weight", "bn1_bias"):
        if name in fresh:
            call.params[name][redrawn] = fresh[name][redrawn]
    return bool(bad.any())


def _small(var: np.ndarray) -> np.ndarray:
    """Which variances are tiny. One of exactly 0 is 0 in every evaluation, and harmless."""
    return (var < 0.1 * np.median(var)) & (var > 0)


def draw_any(case: Case) -> Call:
    """Random tensors from torch's global generator."""
    features, inter = case.channels * case.radix, case.inter
    param_dtype = case.param_dtype or case.dtype
    fan_in1, fan_in2 = case.channels // case.cardinality, inter // case.cardinality
    # The offset gives every channel a mean of its own, so that attention differs between splits.
    x = torch.randn(case.batch, features, case.height, case.width)
    x += torch.randn(case.batch, features, 1, 1)
    params = {
        "fc1_weight": torch.randn(inter, fan_in1, 1, 1) / math.sqrt(fan_in1),
        "fc2_weight": torch.randn(features, fan_in2, 1, 1) / math.sqrt(fan_in2),
    }
    if case.bias:
        params |= {"fc1_bias": torch.randn(inter), "fc2_bias": torch.randn(features)}
    norms = {"bn0": features} if case.has_bn0 else {}
    norms |= {"bn1": inter} if case.norm != "none" else {}
    for name, size in norms.items():
        params[f"{name}_running_mean"] = torch.randn(size)
        params[f"{name}_running_var"] = torch.rand(size) + 0.5
        if case.affine:
            params |= {f"{name}_weight": torch.randn(size), f"{name}_bias": torch.randn(size)}
            # A weight of 0, by which nothing may divide. A group of one feature would be constant.
            if name == "bn1" or fan_in1 * case.radix > 1:
                params[f"{name}_weight"][0] = 0
    dout = torch.randn(case.batch, case.channels, case.height, case.width)
    return Call(
        case,
        LAYOUTS[case.layout](x.to(case.dtype)),
        {name: tensor.to(param_dtype) for name, tensor in params.items()},
        DOUT_LAYOUTS[case.dout_layout](dout.to(case.dtype)),
    )


# Allowed relative error of parameters' gradients, per square root of the number of rows summed.
SUM_TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6}


def check(case: Case, wanted: Collection[str] = DIFFERENTIABLE) -> None:
    """Assert that out and every gradient come as near to the truth as plain PyTorch does.

    The error may be 1.5 times that of PyTorch or of a plain loop, and 1 ulp, in the median of
    several draws. In a single draw, the variance of few samples may magnify the rounding of one
    side. A parameter's gradient is a sum over the batch, and may also have that sum's error. Only
    the gradients ``wanted`` are asked for.
    """
    check_calls([draw(case) for _ in range(5)], wanted)


def _by_backend(call: Call, names: Iterable[str]) -> Results:
    return call.gradients(names=names)


def check_calls(
    calls: list[Call],
    wanted: Collection[str] = DIFFERENTIABLE,
    evaluate: Callable[[Call, Iterable[str]], Results] = _by_backend,
) -> None:
    """:func:`check` for calls of one case; ``evaluate`` gives the results that are checked."""
    case = calls[0].case
    names = [name for name in calls[0].differentiable() if name in wanted]
    ours = [errors_in_ulps(call, *evaluate(call, names)) for call in calls]
    usual_errors = [_usual_errors(call, names) for call in calls]
    for name in ("out", *names):
        found = sorted(errors[name] for errors in ours)
        usual = sorted(errors[name] for errors in usual_errors)
        slack = 1.0
        if name not in ("out", "x"):
            dtype = calls[0].params[name].dtype
            tolerance = SUM_TOLERANCE[torch.promote_types(dtype, torch.float32)]
            slack += tolerance * math.sqrt(case.batch) / torch.finfo(dtype).eps
        middle = len(calls) // 2
        told = f"{name} of {case} in ulps: {found}, usually {usual}"
        assert found[middle] <= 1.5 * usual[middle] + slack, told
        # No draw may have a wrong element, however unlucky.
        assert found[-1] <= 30 * (usual[-1] + slack), told


def errors_in_ulps(call: Call, out: Tensor, grads: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result, in ulps (of the call's dtype) at its largest element."""
    errors = {}
    for name, result in {"out": out, **grads}.items():
        truth = call.truth.values[name]
        assert tuple(result.shape) == truth.shape, name
        scale = call.truth.scales.get(name, float(np.abs(truth).max()))
        dtype = (call.x if name == "out" else call.tensor(name)).dtype
        difference = float(np.abs(oracle.wide(result, truth.dtype.type) - truth).max())
        info = torch.finfo(dtype)
        # Below the smallest normal number the numbers come no closer.
        normal = max(scale, info.smallest_normal)
        ulp = info.eps * 2.0 ** math.floor(math.log2(normal)) if scale else 1.0
        errors[name] = math.inf if math.isnan(difference) else difference / ulp
    return errors


def _usual_errors(call: Call, names: list[str]) -> dict[str, float]:
    """The larger of plain PyTorch's and plain loops' errors.

    PyTorch's errors depend on its order of summation, which differs between CPUs. They are tiny if
    that order happens to suit the numbers. The loops' errors are the same everywhere. Parameters'
    gradients are taken in float32 at least, because even a narrow x needs wide sums.
    """
    wide = torch.promote_types(call.case.dtype, torch.float32)
    parameters = [name for name in names if name != "x"]
    runs = [(call, ["out", *names])]
    if parameters and {t.dtype for t in (call.x, *call.params.values())} != {wide}:
        runs.append((call.to(wide), parameters))
    errors: dict[str, float] = {}
    for run, results in runs:
        eager = errors_in_ulps(call, *run.gradients("reference", names))
        loops = [errors_in_ulps(call, *run.loop(names))]
        if call.case.has_bn0:
            loops.append(errors_in_ulps(call, *run.loop(names, affine=True)))
        errors |= {name: max(eager[name], *(loop[name] for loop in loops)) for name in results}
    return errors
