"""What this machine has the memory to train: `python -m paris_p2p.diffusion.fit_worker`.

The node asks before it claims a role of a big run: torch and the GPU are no matter of its own process.

Owns: the one message each way. Does not own: the estimate (`training`, `memory`), what follows from it (the
node). Down: {"type": "fit", "manifest", "device"}. Up: {"type": "fit", "device", "room": bytes, "router": the
least bytes it takes, "experts": the same for each variant of the recipe}, or {"type": "error", "kind",
"message"}.
"""

import traceback
from pathlib import Path
from typing import Any

from paris_p2p.errors import ConfigError
from paris_p2p.ids import ROUTER, expert_role
from paris_p2p.workers.child import ParentLink


def fit(message: dict[str, Any]) -> dict[str, Any]:
    """The answer to a "fit". Raises `ParisError`."""
    from paris_p2p.diffusion.devices import pick_device
    from paris_p2p.diffusion.training import least_bytes, room
    from paris_p2p.wire.manifest import check_manifest

    recipe = check_manifest(Path(message["manifest"]).read_bytes()).manifest.recipe
    device = str(message["device"])
    return {
        "type": "fit",
        "device": pick_device(device),
        "room": room(device),
        "router": least_bytes(recipe, ROUTER, 0),
        "experts": [least_bytes(recipe, expert_role(0), number) for number in range(len(recipe.experts))],
    }


def main() -> None:
    """Answer once."""
    link = ParentLink.from_environment()
    message = link.receive()
    try:
        answer = fit(message or {})
    except Exception as error:  # noqa: BLE001 - reported to the parent, whatever it was
        kind = "config" if isinstance(error, ConfigError) else "crash"
        if kind == "crash":  # else the message says it all
            traceback.print_exc()
        answer = {"type": "error", "kind": kind, "message": str(error)[:2000]}
    link.send(answer)


if __name__ == "__main__":
    main()
