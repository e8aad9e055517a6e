"""Tests of `paris_node.commands.prepare`."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from paris_node.commands.prepare import PrepareRequest, _assignment, _made, run
from paris_p2p.diffusion.recipes import preset
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output


def test_an_expert_s_kind_is_written_role_equals_kind() -> None:
    assert _assignment("expert-3=small:ddpm") == (3, "small:ddpm")


@pytest.mark.parametrize("text", ["", "expert-3", "expert-3=", "3=small", "expert-x=small", "router=small"])
def test_another_way_of_writing_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="expert-3=small:ddpm"):
        _assignment(text)


def test_experts_whose_start_has_seen_a_share_are_left_the_rest() -> None:
    sizes = {"channels": 1, "image_size": 8, "clusters": 4, "tokens": 4, "text_width": 8, "steps": 80}
    whole, rest = (_made(preset, share, "tiny", **sizes) for share in (None, 0.75))
    assert [recipe.experts[0].training.steps for recipe in (whole, rest)] == [80, 20]
    assert rest.router == whole.router


def test_a_share_of_no_start_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    request = PrepareRequest("digits", tmp_path / "run", init_share=0.75)
    with pytest.raises(ConfigError, match="--init-from"):
        run(request, Output(as_json=True, stdout=io.StringIO()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clusters": 8, "name": "flowers"}, "--clusters, --name: with --shard .*prepare-merge"),
        ({"variants": ("b2",), "variant_of": ("expert-0=b2",)}, "--variant, --variant-of: "),
        ({"router_text": False, "init_from": Path("x")}, "--published-router, --init-from: "),
        ({"steps": 5, "seed": 1, "balanced": True, "drop_duplicates": True}, "--steps, --seed, --balanced, "),
        ({"allow": ("12D3KooW",), "restricted": True}, "--allow, --restricted: "),
    ],
)
def test_a_part_refuses_what_only_the_merge_heeds(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    request = dataclasses.replace(PrepareRequest("digits", tmp_path, shard="1/2"), **given)
    with pytest.raises(ConfigError, match=said):
        run(request, Output(True))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variants": ("banana",)}, "no expert variant 'banana'"),
        ({"variants": ("small", "small:ddpm"), "variant_of": ("expert-0=small:sgd",)}, "'small:sgd'"),
        ({"image_size": 30}, "4 to 128 pixels a side, in steps of 4"),
        ({"image_size": 30, "shard": "1/2"}, "4 to 128 pixels a side, in steps of 4"),
        ({"preset": "banana"}, "no preset 'banana'; there are: tiny, small, b2, xl2"),
        ({"device": "banana"}, "--device 'banana'"),
        ({"init_from": Path("/nowhere")}, "/nowhere holds no safetensors weights"),
    ],
)
def test_what_no_run_could_be_made_with_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("paris_p2p.data.parts.write_part", unread)
    request = PrepareRequest("digits", tmp_path / "run", home=tmp_path / "home", device="cpu")
    with pytest.raises(ConfigError, match=said):
        run(dataclasses.replace(request, **given), Output(True))


def unread(*_: object, **__: object) -> None:
    raise AssertionError("the source is being read")
