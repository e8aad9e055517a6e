"""Packages whose `__init__` imports far more than the one module that is wanted of them.

Owns: putting that `__init__` off until somebody asks the package for a name. Does not own: which packages
those are (who imports below them says so).

`diffusers.models.transformers` imports every transformer that diffusers has, for one class, in every trainer
and checker (what that costs: `ema`). Modules below a deferred package import as ever; the first name that is
looked up in the package itself runs its `__init__`, so nobody else in the process sees a difference.
"""

import importlib.util
import sys
import types
from typing import Any


class _Deferred(types.ModuleType):
    """A package in `sys.modules` that has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system and inspection look for
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = types.ModuleType  # type: ignore[assignment]  # as a module may
        if self.__spec__ is not None and self.__spec__.loader is not None:
            self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer(name: str) -> None:
    """Put the package `name` off, unless it is imported already; its parents are imported.

    One that is not there, or is no package, is left to the import that follows, which says so.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Deferred  # as importlib.util.LazyLoader does
    sys.modules[name] = package
