"""An independent truth for split attention: loops over groups and splits, extended precision.

Nothing here comes from the package. NumPy's ``longdouble`` (80 bits on x86) makes it a truth for
float64 as well; every gradient is written out.

Where an index stands, for radix R, cardinality K, C channels, I inter_channels, group k, split r:
x[b, r*C + k*C/K + i], gap[b, k*C/K + i], hidden[b, k*I/K + j], logits[b, k*R*C/K + r*C/K + i].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray


@dataclass
class Truth:
    """What one call should give; the statistics are None unless the batch's own were used."""

    # "out", and by the names of what is differentiated the gradients.
    values: dict[str, Array]
    relu_input: Array
    batch_mean: Array | None
    batch_var: Array | None
    unbiased_var: Array | None
    # The size of what cancels inside a gradient, where that is not the size of the gradient.
    scales: dict[str, float]


def wide(tensor: torch.Tensor) -> Array:
    """The tensor's values, exactly, in extended precision."""
    return tensor.detach().double().numpy().astype(np.longdouble)


def split_attention(
    x: torch.Tensor,
    params: dict[str, torch.Tensor],
    *,
    radix: int,
    cardinality: int,
    norm: str,
    eps: float = 1e-5,
    dout: torch.Tensor | None = None,
) -> Truth:
    """Evaluate the call, and its gradients when ``dout`` is given.

    ``params`` has ``fc1_weight`` and ``fc2_weight`` and may have ``fc1_bias``, ``fc2_bias``,
    ``bn1_weight``, ``bn1_bias``, ``running_mean`` and ``running_var``. ``norm`` is "none",
    "running" or "batch".
    """
    p = {name: wide(tensor) for name, tensor in params.items()}
    batch, features, height, width = x.shape
    channels, pixels = features // radix, height * width
    inter = p["fc1_weight"].shape[0]
    group, inner = channels // cardinality, inter // cardinality
    z = wide(x).reshape(batch, features, pixels)
    w1 = p["fc1_weight"].reshape(inter, group)
    w2 = p["fc2_weight"].reshape(features, inner)

    def x_slice(k: int, r: int) -> slice:
        start = r * channels + k * group
        return slice(start, start + group)

    def logit_slice(k: int, r: int) -> slice:
        start = k * radix * group + r * group
        return slice(start, start + group)

    def gap_slice(k: int) -> slice:
        return slice(k * group, (k + 1) * group)

    def hidden_slice(k: int) -> slice:
        return slice(k * inner, (k + 1) * inner)

    gap = np.zeros((batch, channels), np.longdouble)
    hidden = np.zeros((batch, inter), np.longdouble)
    for k in range(cardinality):
        for r in range(radix):
            gap[:, gap_slice(k)] += z[:, x_slice(k, r)].sum(axis=2) / pixels
        hidden[:, hidden_slice(k)] = gap[:, gap_slice(k)] @ w1[hidden_slice(k)].T
    if "fc1_bias" in p:
        hidden += p["fc1_bias"]

    mean = var = unbiased = None
    gamma = p.get("bn1_weight", np.ones(inter, np.longdouble))
    if norm == "none":
        normed = hidden
    else:
        if norm == "batch":
            mean = hidden.sum(axis=0) / batch
            var = ((hidden - mean) ** 2).sum(axis=0) / batch
            unbiased = var * batch / (batch - 1)
        else:
            mean, var = p["running_mean"], p["running_var"]
        invstd = 1 / np.sqrt(var + np.longdouble(eps))
        xhat = (hidden - mean) * invstd
        normed = xhat * gamma + p.get("bn1_bias", 0)
    active = normed > 0
    relu = np.where(active, normed, 0)

    logits = np.zeros((batch, features), np.longdouble)
    attention = np.zeros((batch, features), np.longdouble)
    out = np.zeros((batch, channels, pixels), np.longdouble)
    for k in range(cardinality):
        for r in range(radix):
            rows = logit_slice(k, r)
            logits[:, rows] = relu[:, hidden_slice(k)] @ w2[rows].T
            if "fc2_bias" in p:
                logits[:, rows] += p["fc2_bias"][rows]
        of_group = [logits[:, logit_slice(k, r)] for r in range(radix)]
        if radix == 1:
            attention[:, logit_slice(k, 0)] = 1 / (1 + np.exp(-of_group[0]))
        else:
            peak = np.max(of_group, axis=0)
            total = sum(np.exp(logit - peak) for logit in of_group)
            for r in range(radix):
                attention[:, logit_slice(k, r)] = np.exp(of_group[r] - peak) / total
        for r in range(radix):
            weights = attention[:, logit_slice(k, r), None]
            out[:, gap_slice(k)] += weights * z[:, x_slice(k, r)]

    truth = Truth(
        values={"out": out.reshape(batch, channels, height, width)},
        relu_input=normed,
        batch_mean=mean if norm == "batch" else None,
        batch_var=var if norm == "batch" else None,
        unbiased_var=unbiased,
        scales={},
    )
    if dout is None:
        return truth

    g = wide(dout).reshape(batch, channels, pixels)
    dattention = np.zeros_like(attention)
    dlogits = np.zeros_like(logits)
    dw2 = np.zeros_like(w2)
    drelu = np.zeros_like(hidden)
    for k in range(cardinality):
        for r in range(radix):
            products = g[:, gap_slice(k)] * z[:, x_slice(k, r)]
            dattention[:, logit_slice(k, r)] = products.sum(axis=2)
        mixed = sum(
            attention[:, logit_slice(k, r)] * dattention[:, logit_slice(k, r)] for r in range(radix)
        )
        for r in range(radix):
            rows = logit_slice(k, r)
            a, da = attention[:, rows], dattention[:, rows]
            dlogits[:, rows] = a * (1 - a) * da if radix == 1 else a * (da - mixed)
            dw2[rows] = dlogits[:, rows].T @ relu[:, hidden_slice(k)]
            drelu[:, hidden_slice(k)] += dlogits[:, rows] @ w2[rows]

    grads = {"fc2_weight": dw2, "fc2_bias": dlogits.sum(axis=0)}
    dhidden = np.where(active, drelu, 0)
    if norm != "none":
        grads["bn1_weight"] = (dhidden * xhat).sum(axis=0)
        grads["bn1_bias"] = dhidden.sum(axis=0)
        dhidden = dhidden * gamma
        if norm == "batch" and batch:
            terms = (
                dhidden,
                -dhidden.sum(axis=0) / batch,
                -xhat * (dhidden * xhat).sum(axis=0) / batch,
            )
            dhidden = sum(terms)
            size = sum(np.abs(term) for term in terms) * invstd
            largest_gap = np.abs(gap).max(axis=1)
            truth.scales = {
                "fc1_weight": float((largest_gap @ size).max()),
                "fc1_bias": float(size.sum(axis=0).max()),
            }
        dhidden = dhidden * invstd

    dw1 = np.zeros_like(w1)
    dz = np.zeros_like(z)
    for k in range(cardinality):
        dw1[hidden_slice(k)] = dhidden[:, hidden_slice(k)].T @ gap[:, gap_slice(k)]
        dgap = dhidden[:, hidden_slice(k)] @ w1[hidden_slice(k)]
        for r in range(radix):
            direct = attention[:, logit_slice(k, r), None] * g[:, gap_slice(k)]
            dz[:, x_slice(k, r)] = direct + dgap[:, :, None] / pixels
    grads |= {"x": dz, "fc1_weight": dw1, "fc1_bias": dhidden.sum(axis=0)}
    shapes = {"x": x.shape, **{name: tensor.shape for name, tensor in params.items()}}
    truth.values |= {name: grads[name].reshape(shapes[name]) for name in grads if name in shapes}
    return truth
