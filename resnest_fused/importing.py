"""Acts when another package's module is imported, which may be never.

Some of them take long to import, and are imported by their users only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_Action = Callable[[ModuleType], None]


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for as always, but acts once they are imported."""

    def __init__(self) -> None:
        self.actions: dict[str, list[_Action]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            for act in self.actions[name]:
                act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def when_imported(name: str, act: _Action) -> None:
    """Call ``act`` with the module of this name, now or when it is imported.

    Example::

        when_imported("timm.models", lambda models: print(models.list_models()))
    """
    if name in sys.modules:
        act(sys.modules[name])
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.actions.setdefault(name, []).append(act)
