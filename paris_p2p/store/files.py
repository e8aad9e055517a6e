"""Moving, linking and measuring files and folders, never over something that is there.

Owns: the file system's ways. Does not own: what the files are. Everything raises `OSError`.
"""

import errno
import os
import shutil
from pathlib import Path

from paris_p2p.store.hashing import SourceFile

_CANNOT_LINK = {
    *(errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK),
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),  # one thing said in three ways
}


def allocated(folder: Path) -> int:
    """Bytes of disk a folder's files take (holes take none)."""
    return sum(
        os.lstat(Path(parent, name)).st_blocks * 512 for parent, _, names in os.walk(folder) for name in names
    )


def link(source: Path, target: Path) -> bool:
    """A hard link, False where there can be none. Raises `FileExistsError` when `target` exists."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    return True


def link_or_copy(source: str, target: str) -> None:
    """The same bytes on disk where that is possible, else a copy; as `shutil.copytree` wants it."""
    if not link(Path(source), Path(target)):
        shutil.copyfile(source, target, follow_symlinks=False)


def link_tree(source: Path, target: Path) -> bool:
    """Give every file below `source` a second name below `target`, which must not exist.

    False, with `target` possibly begun, where the file system has no hard links.
    """
    target.mkdir()
    for parent, folders, names in os.walk(source):
        below = target / Path(parent).relative_to(source)
        for name in folders:
            (below / name).mkdir()
        for name in names:
            if not link(Path(parent, name), below / name):
                return False
    return True


def share_tree(source: Path, target: Path) -> None:
    """Give every regular file below `source` a second name below `target`, or a copy where that cannot be.
    Symbolic links are left out: they would dangle when `source` goes."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.is_symlink():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(str(path), str(place))


def bring(file: SourceFile, target: Path, *, share: bool) -> SourceFile:
    """Put a file at `target`: the same bytes on disk where `share` allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (share and link(file.source, target)):
        shutil.copyfile(file.source, target, follow_symlinks=False)
    return SourceFile(file.path, target, target.lstat().st_size)


def delete(source: Path) -> None:
    """A file, a link, or a folder with all that is in it."""
    if source.is_dir() and not source.is_symlink():
        shutil.rmtree(source)
    else:
        source.unlink()


def rename(source: Path, target: Path) -> None:
    """Rename. Raises `FileExistsError`, or for a folder `OSError`, when `target` is there and not empty."""
    if source.is_dir():
        source.rename(target)
        return
    if link(source, target):
        source.unlink()
    elif target.exists():
        raise FileExistsError(errno.EEXIST, "it exists", str(target))
    else:
        source.rename(target)
