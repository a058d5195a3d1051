"""What must hold when the package is imported anew and reloaded.

test_reimport.py runs this program in a copy of the package, which the program edits.
"""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resnest_fused as rf

FOLDER = Path(rf.__file__).parent
BACKENDS = {
    "native": torch.ops.resnest_fused,
    "triton": torch.ops.resnest_fused_triton,
}
X = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))


def our_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "resnest_fused"]


def import_anew() -> ModuleType:
    for name in our_modules():
        del sys.modules[name]
    return importlib.import_module("resnest_fused")


def reload_all() -> ModuleType:
    """Reload inner modules first, as outer ones take names from them; the compiled one stays."""
    for name in sorted(our_modules(), key=lambda name: -name.count(".")):
        if not name.endswith("._C"):
            importlib.reload(sys.modules[name])
    return sys.modules["resnest_fused"]


def results(module: nn.Module) -> list[Tensor]:
    """out, which comes first, and the gradients."""
    found = []
    for backend in BACKENDS:
        module.backend = backend
        out = module(X)
        found += [out, *torch.autograd.grad(out.sum(), list(module.parameters()))]
    module.backend = "auto"
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def made_before_goes_on(renewals: list[Callable[[], ModuleType]]) -> None:
    old = rf.FusedSplitAttention(16).eval()
    network = nn.Sequential(rf.SplitAttentionConv2d(32, 8, 3)).eval()
    rf.fuse(network)
    norm = old.bn1
    bn1 = rf.BatchNormArgs(norm.weight, norm.bias, norm.running_mean, norm.running_var)
    expected, pickled, of_network = results(old), pickle.dumps(old), network(X)
    old_graph = compiled(old)
    assert_same([old_graph(X)], expected[:1])
    for renew in renewals:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new_rf = renew()
        assert all(status.available for status in new_rf.backends()), new_rf.backends()
        assert_same(
            [network(X), old_graph(X), *results(old)], [of_network, *expected[:1], *expected]
        )
        new = new_rf.FusedSplitAttention(16).eval()
        new.load_state_dict(old.state_dict())
        restored = pickle.loads(pickled)
        assert type(restored) is type(new)
        for module in (new, restored):
            assert_same([compiled(module)(X), *results(module)], [expected[0], *expected])
        # Its class is not the new BatchNormArgs, but must still be accepted.
        fcs = (new.fc1.weight, new.fc1.bias, new.fc2.weight, new.fc2.bias)
        assert_same([new_rf.split_attention(X, *fcs, radix=2, bn1=bn1)], expected[:1])
        for ops in BACKENDS.values():
            arguments = (X, False, 2, None, None, None, None, 0.0, False)
            torch.library.opcheck(ops.pool.default, arguments)


def edited_runs(renew: Callable[[], ModuleType], old: int, new: int) -> None:
    """Edit an op's function, a phase, a fake kernel and a FLOP formula, and run the edited ones."""
    for file, place, mark in (
        (
            "backends/triton/ops.py",
            "def batch_statistics(",
            "    return x.new_empty({0}), x.new_empty(0)\n",
        ),
        ("backends/triton/pool.py", "def pool(", "    return m.empty({0})\n"),
        ("ops.py", "def batch_statistics(", "    return x.new_empty({0}), x.new_empty(0)\n"),
        ("backends/flops.py", "def split_attention(", "    return {0}\n"),
    ):
        path = FOLDER / file
        text = path.read_text().replace(mark.format(old), "")
        before, head, after = text.partition(place)
        signature, end, body = after.partition(":\n")
        assert body, (file, place)
        path.write_text(before + head + signature + end + mark.format(new) + body)
    held = [ops.batch_statistics.default for ops in BACKENDS.values()]
    new_rf = renew()
    assert held[1](X)[0].shape == (new,)
    pooled = torch.ops.resnest_fused_triton.pool(X, False, 2, None, None, None, None, 0.0, False)
    assert pooled.shape == (new,)
    for op in held:
        assert op(X.to("meta"))[0].shape == (new,)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module = new_rf.FusedSplitAttention(16)
        fcs = (module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)
        new_rf.split_attention(X, *fcs, radix=2)
    assert counter.get_total_flops() == new


if __name__ == "__main__":
    assert FOLDER.parent == Path.cwd(), "not the copy"
    made_before_goes_on([import_anew, reload_all])
    edited_runs(import_anew, 0, 3)
    edited_runs(reload_all, 3, 5)
