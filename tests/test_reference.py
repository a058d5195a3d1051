"""The reference against the oracle, in float64, and its modules against the function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import NORMS, PROLOGUES, Case, draw
from torch import nn

import resnest_fused as rf
from resnest_fused import reference


def assert_equals_truth(ours: torch.Tensor, truth: np.ndarray, name: str) -> None:
    assert tuple(ours.shape) == truth.shape, name
    np.testing.assert_allclose(
        ours.cpu().numpy(), truth.astype(np.float64), rtol=1e-10, atol=1e-12, err_msg=name
    )


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cardinality", [1, 2, 3, 4])
@pytest.mark.parametrize("radix", [1, 2, 3, 4])
def test_out_and_gradients_equal_the_oracle(
    radix: int, cardinality: int, norm: str, prologue: str
) -> None:
    case = Case(3, 12, 2, 5, radix, cardinality, 24, torch.float64, norm=norm, prologue=prologue)
    call = draw(case)
    out, grads = call.gradients("reference")
    results = {"out": out, **grads}
    assert set(results) == set(call.truth.values)
    for name, value in results.items():
        assert_equals_truth(value, call.truth.values[name], name)


@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_optional_parameters(prologue: str, norm: str, bias: bool, affine: bool) -> None:
    options = {"bias": bias, "affine": affine, "norm": norm, "prologue": prologue}
    call = draw(Case(4, 6, 3, 3, 2, 2, 4, torch.float64, **options))
    out, grads = call.gradients("reference")
    for name, value in {"out": out, **grads}.items():
        assert_equals_truth(value, call.truth.values[name], name)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_the_oracle_s_gradients_are_those_of_its_forward(prologue: str) -> None:
    """Central differences show it, independent of any derived formula."""
    call = draw(Case(3, 4, 2, 2, 2, 2, 4, torch.float64, norm="batch", prologue=prologue))
    truth, dout = call.truth, call.dout.cpu().numpy()
    step = 1e-6
    for name in call.differentiable():
        values = call.tensor(name).view(-1)
        for i in range(values.numel()):
            kept = values[i].item()
            moved = []
            for value in (kept + step, kept - step):
                values[i] = value
                moved.append(float((call.evaluate().values["out"] * dout).sum()))
            values[i] = kept
            gradient = float(truth.values[name].reshape(-1)[i])
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(gradient, abs=1e-7), name


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_batch_statistics_enter_the_running_ones(backend: str) -> None:
    call = draw(Case(5, 6, 3, 2, 2, 3, 9, torch.float64, norm="batch", prologue="batch"))
    p = call.params
    norms = {
        name: rf.BatchNormArgs(
            p[f"{name}_weight"],
            p[f"{name}_bias"],
            p[f"{name}_running_mean"].clone(),
            p[f"{name}_running_var"].clone(),
            momentum=0.3,
        )
        for name in ("bn0", "bn1")
    }
    rf.split_attention(
        call.x,
        p["fc1_weight"],
        p["fc1_bias"],
        p["fc2_weight"],
        p["fc2_bias"],
        radix=2,
        cardinality=3,
        **norms,
        training=True,
        backend=backend,
    )
    for name, truth in (("bn0", call.truth.bn0), ("bn1", call.truth.bn1)):
        assert truth is not None
        for statistic, of_batch in (("mean", truth.mean), ("var", truth.unbiased_var)):
            updated = getattr(norms[name], f"running_{statistic}")
            old = p[f"{name}_running_{statistic}"].cpu().numpy()
            assert_equals_truth(updated, 0.7 * old + 0.3 * of_batch, f"{name} {statistic}")


@pytest.mark.parametrize("radix", [1, 2, 3])
def test_attention_is_a_distribution_over_the_splits(radix: int) -> None:
    logits = torch.randn(2, radix * 8, 1, 1, dtype=torch.float64)
    attention = reference.r_softmax(logits, radix, cardinality=4)
    assert attention.shape == (2, radix, 8, 1, 1)
    if radix == 1:
        torch.testing.assert_close(attention.reshape(2, 8, 1, 1), logits.sigmoid())
    else:
        torch.testing.assert_close(attention.sum(dim=1), torch.ones(2, 8, 1, 1).double())


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("training", [False, True])
def test_bn0_is_a_norm_and_a_relu_in_front(training: bool, backend: str) -> None:
    bn0 = nn.BatchNorm2d(12).train(training)
    nn.init.normal_(bn0.weight)
    nn.init.normal_(bn0.bias)
    call = draw(Case(4, 6, 3, 3, norm="none"))
    args = rf.BatchNormArgs(
        bn0.weight, bn0.bias, bn0.running_mean.clone(), bn0.running_var.clone(), momentum=0.1
    )
    p = call.params
    weights = (p["fc1_weight"], p["fc1_bias"], p["fc2_weight"], p["fc2_bias"])
    out = rf.split_attention(
        call.x, *weights, radix=2, bn0=args, training=training, backend=backend
    )
    normed = bn0(call.x)
    for x, relu in ((normed.relu(), False), (normed, True)):
        expected = rf.split_attention(x, *weights, radix=2, relu=relu, backend="reference")
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(args.running_mean, bn0.running_mean)
    torch.testing.assert_close(args.running_var, bn0.running_var)


def test_module_is_the_function_over_its_parameters() -> None:
    module = rf.SplitAttention(12, radix=3, cardinality=2, inter_channels=8).eval()
    nn.init.normal_(module.bn1.running_mean)
    x = torch.randn(2, 36, 4, 5)
    bn1 = module.bn1
    expected = reference.split_attention(
        x,
        module.fc1.weight,
        module.fc1.bias,
        module.fc2.weight,
        module.fc2.bias,
        radix=3,
        cardinality=2,
        bn1=rf.BatchNormArgs(bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var),
    )
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, None])
def test_conv_module_is_conv_norm_relu_attention(norm_layer: type[nn.Module] | None) -> None:
    options = {"radix": 2, "cardinality": 2, "norm_layer": norm_layer}
    module = rf.SplitAttentionConv2d(8, 8, 3, stride=2, padding=1, bias=True, **options)
    attention = rf.SplitAttention(8, **options)
    attention.load_state_dict(
        {k: v for k, v in module.state_dict().items() if k.startswith(("fc", "bn1"))}
    )
    assert module.conv.groups == 4
    x = torch.randn(3, 8, 9, 7)
    z = module.conv(x) if norm_layer is None else nn.BatchNorm2d(16)(module.conv(x))
    torch.testing.assert_close(module(x), attention(z.relu()), rtol=0, atol=0)


def test_names_and_sizes_are_the_official_ones() -> None:
    module = rf.SplitAttentionConv2d(64, 128, 3, padding=1)
    names = [name for name, _ in module.named_children()]
    assert names == ["conv", "bn0", "fc1", "bn1", "fc2"]
    assert module.fc1.weight.shape == (64, 128, 1, 1)
    assert module.fc2.weight.shape == (256, 64, 1, 1)
    assert module.conv.bias is None
    assert rf.SplitAttention(16, radix=2).inter_channels == 32
    assert rf.SplitAttention(64, radix=4, reduction=2).inter_channels == 128
    assert rf.SplitAttention(16, inter_channels=8).inter_channels == 8
    assert rf.SplitAttention(16, norm_layer=None).bn1 is None


def test_out_has_x_s_dtype_when_parameters_are_wider() -> None:
    call = draw(Case(2, 8, 3, 3, dtype=torch.bfloat16, param_dtype=torch.float32))
    assert call.forward("reference").dtype == torch.bfloat16
