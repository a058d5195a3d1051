"""An independent truth for split attention: loops over groups and splits, in wide numbers.

Nothing here comes from the package. Float64 is a truth for narrower dtypes, and NumPy's
``longdouble`` (80 bits on x86) one for float64. Every gradient is written out. In float32 or
float64 the same formulas give what a plain loop computes. It rounds each operation to nearest, and
sums one term after the other. That is a measure of rounding errors that depends on no CPU and no
library.

Index orders, for radix R, cardinality K, C channels, I inter_channels, group k, split r:
x[b, r*C + k*C/K + i], gap[b, k*C/K + i], hidden[b, k*I/K + j], logits[b, k*R*C/K + r*C/K + i].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

Array = np.ndarray


def wide(tensor: torch.Tensor, dtype: type[np.floating] = np.longdouble) -> Array:
    """The tensor's values, exactly, in extended precision or another wide enough dtype."""
    return tensor.detach().double().cpu().numpy().astype(dtype, copy=False)


def _sum(values: Array, *axes: int) -> Array:
    """The sum over these axes; NumPy's own order depends on strides and sometimes on the CPU."""
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    rows = values.transpose(*kept, *axes).reshape(*(values.shape[axis] for axis in kept), -1)
    if rows.shape[-1] == 0:
        return np.zeros(rows.shape[:-1], values.dtype)
    return np.add.accumulate(rows, axis=-1)[..., -1]


def _product(a: Array, b: Array) -> Array:
    """A matrix product without a BLAS, whose kernels differ between CPUs."""
    result = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    for column, row in zip(a.T, b, strict=True):
        result += column[:, None] * row
    return result


def _exp(values: Array) -> Array:
    """exp, rounded to nearest; NumPy's own is not on every CPU, in float32 and float64."""
    with np.errstate(over="ignore"):  # to infinity, as it should
        return np.exp(values.astype(np.longdouble)).astype(values.dtype)


def _statistics(values: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each feature of values (B, features, pixels)."""
    count = values.dtype.type(values.shape[0] * values.shape[2])
    mean = _sum(values, 0, 2) / count
    return mean, _sum((values - mean[:, None]) ** 2, 0, 2) / count


class BatchNorm:
    """``out`` = gamma (values - mean) / sqrt(var + eps) + beta for values (B, features, pixels).

    With ``of_batch`` mean and biased variance are those of the values, else the running ones.
    ``affine`` rounds like scale * values + shift, whose terms are large if the mean is.
    """

    def __init__(
        self,
        name: str,
        values: Array,
        p: dict[str, Array],
        of_batch: bool,
        eps: float,
        affine: bool = False,
    ) -> None:
        self.of_batch = of_batch
        self.count = values.shape[0] * values.shape[2]
        if of_batch:
            self.mean, self.var = _statistics(values)
        else:
            self.mean, self.var = p[f"{name}_running_mean"], p[f"{name}_running_var"]
        self.gamma = p.get(f"{name}_weight", np.ones_like(self.mean))
        beta = p.get(f"{name}_bias", np.zeros_like(self.mean))
        self.invstd = 1 / np.sqrt(self.var + values.dtype.type(eps))
        self.xhat = (values - self.mean[:, None]) * self.invstd[:, None]
        self.out = self.xhat * self.gamma[:, None] + beta[:, None]
        if affine:
            scale = self.gamma * self.invstd
            self.out = values * scale[:, None] + (beta - self.mean * scale)[:, None]

    @property
    def unbiased_var(self) -> Array:
        return self.var * self.count / (self.count - 1)

    def backward(self, dout: Array) -> tuple[Array, Array, Array, Array]:
        """The gradients of values, gamma and beta, and the size of what cancels in the first."""
        dgamma, dbeta = _sum(dout * self.xhat, 0, 2), _sum(dout, 0, 2)
        count = dout.dtype.type(self.count)
        terms = [dout]
        if self.of_batch:
            terms.append(-dbeta[:, None] / count)
            terms.append(-self.xhat * dgamma[:, None] / count)
        slope = (self.gamma * self.invstd)[:, None]
        size = sum(np.abs(term) for term in terms) * np.abs(slope)
        return sum(terms) * slope, dgamma, dbeta, size


@dataclass
class Truth:
    """What one call should give; a normalisation is None where the call has none."""

    # "out", and the gradients by their tensors' names.
    values: dict[str, Array]
    bn0: BatchNorm | None
    bn1: BatchNorm | None
    # The input of the ReLU between the FCs.
    relu_input: Array
    # The size of what cancels inside a gradient, if that differs from the gradient's size.
    scales: dict[str, float] = field(default_factory=dict)


def prologue_input(
    x: torch.Tensor,
    params: dict[str, torch.Tensor],
    prologue: str,
    eps: float,
    dtype: type[np.floating] = np.longdouble,
    affine: bool = False,
) -> tuple[Array, BatchNorm | None]:
    """The input of the prologue's ReLU, (B, features, pixels), and bn0 if there is one."""
    values = wide(x, dtype).reshape(x.shape[0], x.shape[1], -1)
    if prologue in ("none", "relu"):
        return values, None
    p = {name: wide(tensor, dtype) for name, tensor in params.items() if name.startswith("bn0_")}
    bn0 = BatchNorm("bn0", values, p, prologue == "batch", eps, affine)
    return bn0.out, bn0


def split_attention(
    x: torch.Tensor,
    params: dict[str, torch.Tensor],
    *,
    radix: int,
    cardinality: int,
    norm: str,
    prologue: str = "none",
    eps: float = 1e-5,
    dout: torch.Tensor | None = None,
    dtype: type[np.floating] = np.longdouble,
    affine: bool = False,
) -> Truth:
    """Evaluate the call, and its gradients when ``dout`` is given.

    ``params`` has ``fc1_weight`` and ``fc2_weight`` and may have ``fc1_bias``, ``fc2_bias`` and,
    for bn0 and for bn1, ``bn0_weight``, ``bn0_bias``, ``bn0_running_mean``, ``bn0_running_var``.
    ``norm`` gives bn1's statistics: "none", "running" or "batch". ``prologue`` is "none", "relu",
    or "running" or "batch" for bn0 with these statistics and a ReLU. ``affine`` is bn0's: see
    :class:`BatchNorm`.
    """
    p = {name: wide(tensor, dtype) for name, tensor in params.items()}
    batch, features, height, width = x.shape
    channels, pixels = features // radix, height * width
    inter = p["fc1_weight"].shape[0]
    group_channels, group_inter = channels // cardinality, inter // cardinality
    before, bn0 = prologue_input(x, params, prologue, eps, dtype, affine)
    passed = before > 0 if prologue != "none" else True
    z = np.where(passed, before, 0)
    w1 = p["fc1_weight"].reshape(inter, group_channels)
    w2 = p["fc2_weight"].reshape(features, group_inter)

    def x_slice(k: int, r: int) -> slice:
        start = r * channels + k * group_channels
        return slice(start, start + group_channels)

    def logit_slice(k: int, r: int) -> slice:
        start = k * radix * group_channels + r * group_channels
        return slice(start, start + group_channels)

    def gap_slice(k: int) -> slice:
        return slice(k * group_channels, (k + 1) * group_channels)

    def hidden_slice(k: int) -> slice:
        return slice(k * group_inter, (k + 1) * group_inter)

    gap = np.zeros((batch, channels), dtype)
    hidden = np.zeros((batch, inter), dtype)
    for k in range(cardinality):
        for r in range(radix):
            gap[:, gap_slice(k)] += _sum(z[:, x_slice(k, r)], 2) / dtype(pixels)
        hidden[:, hidden_slice(k)] = _product(gap[:, gap_slice(k)], w1[hidden_slice(k)].T)
    if "fc1_bias" in p:
        hidden += p["fc1_bias"]

    bn1 = None
    normed = hidden
    if norm != "none":
        bn1 = BatchNorm("bn1", hidden[:, :, None], p, norm == "batch", eps)
        normed = bn1.out[:, :, 0]
    active = normed > 0
    relu = np.where(active, normed, 0)

    logits = np.zeros((batch, features), dtype)
    attention = np.zeros((batch, features), dtype)
    out = np.zeros((batch, channels, pixels), dtype)
    for k in range(cardinality):
        for r in range(radix):
            rows = logit_slice(k, r)
            logits[:, rows] = _product(relu[:, hidden_slice(k)], w2[rows].T)
            if "fc2_bias" in p:
                logits[:, rows] += p["fc2_bias"][rows]
        of_group = [logits[:, logit_slice(k, r)] for r in range(radix)]
        if radix == 1:
            attention[:, logit_slice(k, 0)] = 1 / (1 + _exp(-of_group[0]))
        else:
            peak = np.max(of_group, axis=0)
            total = sum(_exp(logit - peak) for logit in of_group)
            for r in range(radix):
                attention[:, logit_slice(k, r)] = _exp(of_group[r] - peak) / total
        for r in range(radix):
            weights = attention[:, logit_slice(k, r), None]
            out[:, gap_slice(k)] += weights * z[:, x_slice(k, r)]

    truth = Truth(
        values={"out": out.reshape(batch, channels, height, width)},
        bn0=bn0,
        bn1=bn1,
        relu_input=normed,
    )
    if dout is None:
        return truth

    g = wide(dout, dtype).reshape(batch, channels, pixels)
    dattention = np.zeros_like(attention)
    dlogits = np.zeros_like(logits)
    dw2 = np.zeros_like(w2)
    drelu = np.zeros_like(hidden)
    for k in range(cardinality):
        for r in range(radix):
            products = g[:, gap_slice(k)] * z[:, x_slice(k, r)]
            dattention[:, logit_slice(k, r)] = _sum(products, 2)
        mixed = sum(
            attention[:, logit_slice(k, r)] * dattention[:, logit_slice(k, r)] for r in range(radix)
        )
        for r in range(radix):
            rows = logit_slice(k, r)
            a, da = attention[:, rows], dattention[:, rows]
            dlogits[:, rows] = a * (1 - a) * da if radix == 1 else a * (da - mixed)
            dw2[rows] = _product(dlogits[:, rows].T, relu[:, hidden_slice(k)])
            drelu[:, hidden_slice(k)] += _product(dlogits[:, rows], w2[rows])

    grads = {"fc2_weight": dw2, "fc2_bias": _sum(dlogits, 0)}
    dhidden = np.where(active, drelu, 0)
    if bn1 is not None:
        dnormed = dhidden[:, :, None]
        dhidden, grads["bn1_weight"], grads["bn1_bias"], size = bn1.backward(dnormed)
        dhidden, size = dhidden[:, :, 0], size[:, :, 0]
        if bn1.of_batch:
            largest_gap = np.abs(gap).max(axis=1)
            truth.scales["fc1_weight"] = float((largest_gap @ size).max())
            truth.scales["fc1_bias"] = float(size.sum(axis=0).max())

    dw1 = np.zeros_like(w1)
    dz = np.zeros_like(z)
    for k in range(cardinality):
        dw1[hidden_slice(k)] = _product(dhidden[:, hidden_slice(k)].T, gap[:, gap_slice(k)])
        dgap = _product(dhidden[:, hidden_slice(k)], w1[hidden_slice(k)])
        for r in range(radix):
            direct = attention[:, logit_slice(k, r), None] * g[:, gap_slice(k)]
            dz[:, x_slice(k, r)] = direct + dgap[:, :, None] / dtype(pixels)
    grads |= {"fc1_weight": dw1, "fc1_bias": _sum(dhidden, 0)}

    grads["x"] = dbefore = np.where(passed, dz, 0)
    if bn0 is not None:
        grads["x"], grads["bn0_weight"], grads["bn0_bias"], size = bn0.backward(dbefore)
        # Sums over few pixels may cancel by structure, as sums of xhat do. If chance decides, a sum
        # has the size of its summands' root sum of squares.
        for name, summands in (("bn0_weight", dbefore * bn0.xhat), ("bn0_bias", dbefore)):
            by_chance = np.sqrt((summands**2).sum(axis=(0, 2)))
            truth.scales[name] = float(np.maximum(np.abs(grads[name]), by_chance).max())
        if bn0.of_batch:
            truth.scales["x"] = float(size.max())
    shapes = {"x": x.shape, **{name: tensor.shape for name, tensor in params.items()}}
    truth.values |= {name: grads[name].reshape(shapes[name]) for name in grads if name in shapes}
    return truth
