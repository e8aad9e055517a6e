"""hivemind's DHT without the rest of hivemind: 0.2 s and 40 MB instead of seconds, torch and 290 MB.

Owns: which hivemind modules are loaded, and that they read our clock. Only the DHT worker's modules import
this. hivemind's packages import everything in their `__init__`; registering empty parent packages first
lets the modules below them load unmodified. That relies on the layout of the pinned version, so a failure
falls back to the plain import, which costs time and memory only.
"""

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types

from paris_p2p import clock
from paris_p2p.errors import ConfigError

log = logging.getLogger(__name__)

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
