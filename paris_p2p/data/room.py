"""Disk space for a run being prepared: asking for it beforehand, saying that it ran out.

Owns: the estimate, and safetensors' way of reporting a full disk. Does not own: the writing (`prepare`).
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

from safetensors import SafetensorError

from paris_p2p.components.tiny_clip import TinyClipConfig
from paris_p2p.data.ingest import Ingested
from paris_p2p.errors import StoreError


def require_room(folder: Path, needed: int) -> None:
    """Raises `StoreError` when fewer than `needed` bytes are free where `folder` is: better now than after
    minutes of work."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"disk full: preparing this run needs about {needed} bytes under {folder}, {needed - free} more "
            "than are free; free some space, or choose another --out"
        )


def bytes_needed(data: Ingested, clip: TinyClipConfig) -> int:
    """Latents once; caption encodings at most twice in the shards, and once for all where they are not there
    yet; some change."""
    latents = data.images.size * 4 if data.latents is None else data.latents.nbytes
    if data.text is not None:
        return latents + 2 * data.text.nbytes + (32 << 20)
    captions = len(set(data.captions)) * clip.context_length * clip.width * 4
    return latents + 3 * captions + (32 << 20)


@contextmanager
def full_disk() -> Iterator[None]:
    """safetensors reports a full disk as text."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(ENOSPC, str(error)) from error
        raise
