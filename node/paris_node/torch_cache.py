"""Where torch keeps compiled kernels: in the home folder, for the next start, not in the system's temporary
folder, where importing torch's compiler leaves a directory behind."""

import os

from paris_p2p.store.home import Home

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_torch_cache(home: Home) -> None:
    """Set it for this process and its children, before torch is imported; a user's own setting wins."""
    os.environ.setdefault(_VARIABLE, str(home.path / "cache" / "torchinductor"))
