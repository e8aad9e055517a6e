"""The checker process: `python -m paris_p2p.diffusion.check_worker`, started by the node.

Owns: measuring the held-out loss of weights somebody else made, the way their trainer did. Does not own: what
follows from it (`core.accept.loss_refusal`). Reads local files only; the weights have passed the checks of
`store.weights`, and are loaded by safetensors all the same.

Messages down: {"type": "measure", "manifest", "role", "variant", "weights": folder, "shards": [{"cluster",
"heldout": folder}]}. Up, one each: {"type": "measured", "loss", "baseline"} (`baseline`: the loss of a
network that says nothing, zero everywhere) or {"type": "error", "message"}. Ends with its parent.
"""

import math
import os
import traceback
from pathlib import Path
from typing import Any

from paris_p2p.ids import ROUTER, Role
from paris_p2p.workers.child import ParentLink

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CHUNK = 1024  # images
NICENESS = 5
"""Nobody waits for a check; the trainer beside it should not."""


def measure(message: dict[str, Any]) -> dict[str, Any]:
    """The answer to one "measure". Raises what torch and the readers raise."""
    import torch
    from safetensors.torch import load_file

    from paris_p2p.diffusion.shards import Examples, load_shard
    from paris_p2p.diffusion.training import Trainer
    from paris_p2p.wire.manifest import check_manifest

    torch.set_num_threads(1)
    recipe = check_manifest(Path(message["manifest"]).read_bytes()).manifest.recipe
    shards = [load_shard(Path(s["heldout"]), recipe, int(s["cluster"])) for s in message["shards"]]
    heldout = Examples(shards)
    trainer = Trainer(recipe, Role(message["role"]), int(message["variant"]), heldout, heldout, "cpu")
    weights = load_file(Path(message["weights"]) / WEIGHTS_NAME)
    with torch.no_grad():
        for (name, _), average in zip(
            trainer.model.named_parameters(), trainer.ema.shadow_params, strict=True
        ):
            average.copy_(weights[name])
    baseline = math.log(len(shards)) if trainer.plan.role == ROUTER else baseline_loss(trainer)
    return {"type": "measured", "loss": trainer.heldout_loss(), "baseline": baseline}


def baseline_loss(trainer: Any) -> float:
    """The held-out loss of an expert that always answers zero: the mean square of what it should answer."""
    if trainer.plan.objective == "ddpm":
        return 1.0  # standard normal noise
    total, count = 0.0, 0
    for shard in trainer.heldout_data.shards:
        for latents in shard.latents.split(CHUNK):
            total += float(latents.double().square().sum())
            count += latents.numel()
    return 1.0 + total / count  # v = eps - x0, eps and x0 independent


def main() -> None:
    """Answer until the parent goes."""
    link = ParentLink.from_environment()
    os.nice(NICENESS)
    while True:
        message = link.receive()
        if message is None:
            continue
        try:
            answer = measure(message)
        except Exception as error:  # noqa: BLE001 - reported to the parent, whatever it was
            traceback.print_exc()
            answer = {"type": "error", "message": str(error)[:2000]}
        link.send(answer)


if __name__ == "__main__":
    main()
