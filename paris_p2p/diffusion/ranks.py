"""Several devices of one machine on one role: the other processes, and keeping them in step.

Owns: starting one process for each further device, what the first one tells them before every step, their
end. Does not own: how a step is shared (`training`). Only the first process (rank 0) knows the parent.

`python -m paris_p2p.diffusion.ranks` is such a further process; rank 0 starts it, with the start message as
its only argument, and it dies with rank 0.
"""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from paris_p2p.errors import WorkerError
from paris_p2p.workers.child import PARENT_VARIABLE, install_death_signal

log = logging.getLogger(__name__)

END_S = 10.0


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torch.distributed and Accelerate read to find each other on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def further_ranks(count: int, start: Mapping[str, Any]) -> Iterator[None]:
    """Make this process rank 0 of `count`, and run the others meanwhile. `start`: the start message."""
    if count == 1:
        yield
        return
    port = _free_port()
    others = [_start(rank, count, port, start) for rank in range(1, count)]
    os.environ.update(environment(0, count, port))
    try:
        yield
    except RuntimeError as error:  # what a collective operation raises when its peer is gone
        dead = [f"rank {rank}" for rank, other in enumerate(others, 1) if other.poll() not in (None, 0)]
        if not dead:
            raise
        raise WorkerError(f"the process of another device ended: {', '.join(dead)} ({error})") from error
    finally:
        _end(others)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(rank: int, count: int, port: int, start: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    own = {**environment(rank, count, port), PARENT_VARIABLE: str(os.getpid())}
    command = [sys.executable, "-m", "paris_p2p.diffusion.ranks", json.dumps(dict(start))]
    return subprocess.Popen(command, env={**os.environ, **own}, stdin=subprocess.DEVNULL)


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    """They end by themselves when training does; when it failed they may wait for rank 0, so not for ever."""
    for other in others:
        try:
            other.wait(END_S)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()


def in_step(trainer: Any, go_on: bool) -> bool:
    """Rank 0's `go_on`, in every rank: called by all of them before each step."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return go_on
    import torch
    from accelerate.utils import broadcast

    word = torch.tensor(float(go_on), device=trainer.device)
    return bool(broadcast(word, from_process=0).item())


def main() -> None:
    """A further rank: train in step with rank 0 until it says that this is the end."""
    install_death_signal()
    from paris_p2p.diffusion.train_worker import make_trainer, parse_start

    trainer = make_trainer(parse_start(json.loads(sys.argv[1])))
    while in_step(trainer, True):
        trainer.train_step()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
