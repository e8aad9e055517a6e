"""Tests of `paris_node.commands.generate`."""

from pathlib import Path

import pytest

from paris_node.commands.generate import GenerateRequest, remembered_model, run
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home


def request(home: Path, max_memory: str | None) -> GenerateRequest:
    return GenerateRequest(
        prompts=("seven",),
        model=home / "model",
        n=1,
        seed=0,
        steps=None,
        guidance=None,
        top_k=None,
        threshold=None,
        temperature=1.0,
        scheduler=None,
        device="cpu",
        dtype="fp32",
        max_memory=max_memory,
        offload=False,
        out=None,
        grid=None,
        home=home,
    )


def test_a_limit_of_memory_is_read_as_any_number_of_bytes_before_a_model_is_looked_for(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="--max-memory much"):
        run(request(tmp_path, "much"), Output(True))
    with pytest.raises(ConfigError, match="model is no model folder: run paris-node fetch-model"):
        run(request(tmp_path, "800MiB"), Output(True))


def test_without_a_model_fetched_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fetch-model"):
        remembered_model(Home(tmp_path))
