"""hivemind's DHT without the rest of hivemind: 0.2 s and 40 MB instead of seconds, torch and 290 MB.

Owns: which hivemind modules are loaded, that they read our clock, and that what is replaced in them is there.
Only the DHT worker's modules import this. hivemind's packages import everything in their `__init__`;
registering empty parent packages first lets the modules below them load unmodified. That relies on the layout
of the pinned version, so a failure falls back to the plain import, which costs time and memory only.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from paris_p2p import clock
from paris_p2p.errors import ConfigError

log = logging.getLogger(__name__)

TESTED_VERSION = "1.1.12"
"""As in constraints.txt. What is replaced in hivemind, or overrides a method of it, closes holes: in a
version that does those things elsewhere they would be open again, and nothing would say so."""

_missing: list[str] = []

# package -> names that the modules below it import from the package itself
_PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "hivemind": {},
    "hivemind.utils": {
        "hivemind.utils.logging": ("get_logger",),
        "hivemind.utils.serializer": ("MSGPackSerializer", "SerializerBase"),
        "hivemind.utils.timed_storage": ("get_dht_time",),
    },
    "hivemind.dht": {},
}


def load_hivemind_dht() -> str:
    """Make `hivemind.dht.node` importable; `light` or `plain`, the way it went. Idempotent."""
    if "hivemind.dht.node" in sys.modules:
        return "light" if "torch" not in sys.modules else "plain"
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "WARNING")
    os.environ.setdefault("HIVEMIND_COLORS", "0")
    way = "light"
    try:
        _register_packages()
        importlib.import_module("hivemind.dht.node")
    except (ImportError, AttributeError) as error:
        log.warning("light import of hivemind failed (%s): importing all of it", error)
        way = "plain"
        _forget_hivemind()
        importlib.import_module("hivemind.dht.node")
    _use_our_clock()
    return way


def replace(module: str, name: str, value: Any) -> Any:
    """Put `value` in the place of a global of a loaded hivemind module; what was there. When nothing was,
    `require_tested` says so."""
    names = vars(sys.modules[module])
    if name not in names:
        _missing.append(f"{module}.{name}")
    previous, names[name] = names.get(name), value
    return previous


def require_tested(overridden: Mapping[type, Sequence[str]]) -> None:
    """Raises `ConfigError`, with what to do, unless hivemind is of the tested version and has all that is
    replaced in it, and the methods `overridden` of its classes."""
    found = importlib.metadata.version("hivemind")
    methods = [(kind, name) for kind, names in overridden.items() for name in names]
    lacks = [*_missing, *(f"{kind.__name__}.{name}" for kind, name in methods if not hasattr(kind, name))]
    if found != TESTED_VERSION or lacks:
        what = f" (it lacks {', '.join(lacks)})" if lacks else ""
        raise ConfigError(
            f"hivemind {found} is installed{what}, and paris-p2p is made for {TESTED_VERSION}: run "
            f"pip install hivemind=={TESTED_VERSION}, or install paris-p2p again with its constraints.txt"
        )


def _register_packages() -> None:
    spec = importlib.util.find_spec("hivemind")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("hivemind is not installed: install paris-p2p again")
    root = next(iter(spec.submodule_search_locations))
    for name in _PACKAGES:
        folder = os.path.join(root, *name.split(".")[1:])  # noqa: PTH118 - import paths are text
        package = types.ModuleType(name)
        package.__path__ = [folder]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    for name, exports in _PACKAGES.items():
        for module, names in exports.items():
            loaded = importlib.import_module(module)
            for attribute in names:
                setattr(sys.modules[name], attribute, getattr(loaded, attribute))


def _forget_hivemind() -> None:
    for name in [name for name in sys.modules if name == "hivemind" or name.startswith("hivemind.")]:
        del sys.modules[name]


def _use_our_clock() -> None:
    """hivemind's clock is a global that its modules imported by name: replace it in each."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hivemind") and hasattr(module, "get_dht_time"):
            vars(module)["get_dht_time"] = clock.unix
