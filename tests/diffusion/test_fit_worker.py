"""Tests of `paris_p2p.diffusion.fit_worker`, in this process."""

from pathlib import Path

import pytest

from paris_p2p.diffusion import memory
from paris_p2p.diffusion.fit_worker import fit
from paris_p2p.diffusion.training import least_bytes
from paris_p2p.errors import ConfigError
from paris_p2p.ids import ROUTER, expert_role

from .conftest import toy_manifest, toy_recipe


def test_it_says_what_each_network_takes_and_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe()
    path = tmp_path / "manifest.paris"
    path.write_bytes(toy_manifest(recipe).data)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    answer = fit({"type": "fit", "manifest": str(path), "device": "cpu"})
    assert (answer["device"], answer["room"]) == ("cpu", int(1000 * memory.SHARE))
    assert answer["experts"] == [least_bytes(recipe, expert_role(0), 0)]
    assert answer["router"] == least_bytes(recipe, ROUTER, 0)
    with pytest.raises(ConfigError, match="cuda:99"):
        fit({"type": "fit", "manifest": str(path), "device": "cuda:99"})
