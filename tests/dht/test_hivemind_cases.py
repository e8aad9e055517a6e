"""Runs what imports hivemind in processes of their own (see `hivemind_cases.py`, `worker_cases.py`)."""

import subprocess
import sys
from pathlib import Path

FALLBACK = """
import sys
from paris_p2p import clock
from paris_p2p.dht import hivemind_import
def broken(): raise ImportError("another layout")
hivemind_import._register_packages = broken
assert hivemind_import.load_hivemind_dht() == "plain"
import hivemind
from hivemind.dht import node, protocol
assert "torch" in sys.modules
assert node.get_dht_time is protocol.get_dht_time is hivemind.utils.get_dht_time is clock.unix
"""


def test_the_validator_the_storage_and_the_worker_do_as_their_cases_say() -> None:
    cases = [str(Path(__file__).with_name(name)) for name in ("hivemind_cases.py", "worker_cases.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_layout_of_hivemind_falls_back_to_the_plain_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "light import of hivemind failed" in done.stderr
