"""Tests of what `benchmarks/quality.py` makes of scores, and of who takes part."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.lab.contenders import BASELINE, CONTROL, Settings, contenders, networks_for, start_of

SETTINGS = Settings("digits", "tiny", None, 4, 100, 0)


def result(seed: int, **distances: float) -> dict[str, Any]:
    names = {"mono": BASELINE, "control": CONTROL}
    for router in ("text-aware", "published"):
        names |= {f"{router[:4]}{k}": f"top-{k}, {router} router" for k in (1, 2)}
    scores = {
        names[short]: {
            "frechet_distance": value,
            "precision": 0.5,
            "recall": 0.5,
            "fidelity": None,
            "name": names[short],
        }
        for short, value in distances.items()
    }
    trained = {"heldout_loss": 0.5, "samples": 640, "steps": 10, "batch_size": 64}
    return {"seed": seed, "scores": scores, "networks": {BASELINE: trained, "expert-0": trained}, "cpu_s": 1}


RESULTS = [
    result(0, mono=10.0, control=4.0, text1=6.0, text2=5.0, publ1=8.0, publ2=9.0),
    result(1, mono=20.0, control=5.0, text1=4.0, text2=6.0, publ1=8.0, publ2=9.0),
    result(2, mono=10.0, control=8.0, text1=4.0, text2=6.0, publ1=8.0, publ2=9.0),
]


def test_the_ratios_are_of_the_better_sparse_routing_within_each_seed() -> None:
    found = quality.summary(RESULTS)
    assert (found["ratio"], found["ratio_spread"]) == (0.4, [0.2, 0.5])
    assert (found["ratio_control"], found["ratio_control_spread"]) == (0.8, [0.5, 1.25])
    assert (found["ratio_text_free"], found["ratio_control_text_free"]) == (0.8, 1.6)
    assert found["medians"][BASELINE]["frechet_distance"] == 10.0
    assert "fidelity" not in found["medians"][BASELINE]


def test_the_table_has_medians_and_ranges(tmp_path: Path) -> None:
    (tmp_path / "yardstick").mkdir()
    (tmp_path / "yardstick" / "yardstick.json").write_text(json.dumps({"accuracy": 0.9, "floor": 0.25}))
    arguments = argparse.Namespace(work=tmp_path, samples=100)
    table = quality.markdown(RESULTS, arguments)
    assert "| monolithic | 10.00 (10.00 to 20.00) |" in table
    assert "| top-1, text-aware router | 4.00 (4.00 to 6.00) |" in table
    assert "0.40 (0.20 to 0.60) | 0.80 (0.50 to 1.50) |" in table
    assert "| expert-0 | 10 x 64 | 640 | 0.500 (0.500 to 0.500) |" in table


def test_extras_reuse_the_experts_and_train_only_what_is_new() -> None:
    headline = contenders(SETTINGS, 0, False, False, False)
    plain, later = networks_for(headline, SETTINGS)
    assert plain[:4] == ["monolithic-control", "monolithic", "router", "router-text-free"]
    assert (len(plain), later) == (8, [])
    everyone = contenders(SETTINGS, 4, True, True, True)
    assert everyone[:4] == headline[:4]
    more, later = networks_for(everyone, SETTINGS)
    assert set(more) - set(plain) == {"expert-3-ddpm", "start"}
    assert len(more) == len(set(more))
    assert later == [f"expert-{k}-started" for k in range(4)]


def test_a_start_that_keeps_its_rate_is_trained_first_and_judged_alone_too() -> None:
    found = contenders(SETTINGS, 0, False, False, False, 0.75)
    assert found[6].networks == ("start-0.75",)
    first, later = networks_for(found, SETTINGS)
    assert first[2] == "start-0.75"
    assert later == ["one-after-0.75", *(f"expert-{k}-after-0.75" for k in range(4))]
    assert {start_of(name) for name in later} == {"start-0.75"}
    assert (start_of("expert-0-started"), start_of("expert-0")) == ("start", None)


def test_results_are_kept_and_another_comparison_is_refused(tmp_path: Path) -> None:
    done = quality.Done(tmp_path / "scores")
    assert done.get("a") is None
    done.put("a", {"x": 1})
    assert done.get("a") == {"x": 1}
    settings = {"data": "digits", "preset": "tiny", "image_size": None, "clusters": 4}
    arguments = argparse.Namespace(work=tmp_path, steps=100, labels=None, feature_steps=300, **settings)
    quality.same_settings(arguments)
    quality.same_settings(arguments)
    arguments.steps = 200
    with pytest.raises(SystemExit, match="another comparison"):
        quality.same_settings(arguments)
