"""Tests of `paris_p2p.store.locks`."""

import os
import subprocess
import sys
from pathlib import Path

from paris_p2p.store.locks import holder, try_lock

HOLD = """
import sys
from pathlib import Path
from paris_p2p.store.locks import try_lock
lock = try_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_has_one_holder_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = try_lock(path)
    assert first is not None and try_lock(path) is None
    assert holder(path) == f"process {os.getpid()}"
    first.release()
    first.release()
    assert not path.exists()
    second = try_lock(path)
    assert second is not None
    second.release()


def test_a_killed_holder_leaves_nothing_behind_that_blocks(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert try_lock(path) is None and holder(path) == f"process {child.pid}"
        child.kill()
    lock = try_lock(path)
    assert lock is not None
    lock.release()


def test_a_holder_that_left_no_number_is_another_process(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("?")
    assert holder(tmp_path / "lock") == holder(tmp_path / "absent") == "another process"
