"""The paper's comparison at a size this machine allows: isolated experts against one monolithic network.

For every seed: prepare a run (k-means clusters), train K experts, a router with text and one without (as
published), one network on all data with the same samples and K times the batch (the paper's baseline), and
the control, the same network at the experts' own batch size. Then judge all of them against the real images
with one feature network, trained on those and their labels only. Everything goes through the package's own
prepare, trainer, pipeline and evaluation. Networks and judgements are kept under `--work`: interrupted, or
called again with more seeds or more contenders, it goes on from there. `results.md` and `grid-<seed>.png` in
`--work` are written anew after every seed.

`--ddpm-every N` adds the experts with every N-th one trained as a DDPM noise predictor; `--shared-start` adds
experts that start from one network which saw half of the samples (as the paper's video successor does it);
`--kept-rate S` experts whose start saw the share S of them and leaves bringing the rate down to them;
`--full` adds mixing all experts, `--knobs` other temperatures and a threshold.

The last line is one JSON object. `ratio`: Frechet distance of the best sparse routing (Top-1 or Top-2,
text-aware router) over the monolithic baseline's, median over seeds, with its spread; `ratio_control`: over
the control's; `*_text_free`: the same with the router as published.

    python benchmarks/quality.py                                   # digits, two minutes of a core
    python benchmarks/quality.py --data train.parquet --image-size 32 --clusters 8 --steps 2000 --seeds 0 1 2
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lab.contenders import (
    BASELINE,
    CONTROL,
    NOT_NETWORKS,
    Settings,
    Task,
    contenders,
    judge,
    networks_for,
    prepare_run,
    train_one,
    train_yardstick,
)

MEASURES = ("frechet_distance", "precision", "recall", "fidelity")


class Done:
    """Results as files: what is there is not made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str) -> dict[str, Any] | None:
        """The result called `name`, if it is there."""
        path = self._folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Keep `value`, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{name}.part"
        part.write_text(json.dumps(value))
        part.replace(self._folder / f"{name}.json")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def run_missing(
    pool: ProcessPoolExecutor,
    done: Done,
    names: Iterable[str],
    work: Callable[..., dict[str, Any]],
    task: Callable[[str], tuple[Any, ...]],
    told: Callable[[str, dict[str, Any]], str],
) -> dict[str, dict[str, Any]]:
    """`work(*task(name))` for every name without a result, in the pool, kept and told as they come."""
    names = list(names)
    waiting = {name: pool.submit(work, *task(name)) for name in names if done.get(name) is None}
    for name, future in waiting.items():
        done.put(name, future.result())
        say(told(name, future.result()))
    return {name: done.get(name) or {} for name in names}


def one_seed(arguments: argparse.Namespace, pool: ProcessPoolExecutor, seed: int) -> dict[str, Any]:
    """Prepare, train and judge one seed."""
    root: Path = arguments.work / f"seed-{seed}"
    settings = settings_of(arguments, seed)
    if not (root / "prepared" / "prepare.json").exists():
        pool.submit(prepare_run, settings, root / "prepared").result()
    task = Task(settings, root / "prepared", root / "networks", arguments.device)
    wanted = contenders(
        settings,
        arguments.ddpm_every,
        arguments.shared_start,
        arguments.full,
        arguments.knobs,
        arguments.kept_rate,
    )
    trained: dict[str, Any] = {}
    for group in networks_for(wanted, settings):
        trained |= run_missing(
            pool,
            Done(root / "trained"),
            group,
            train_one,
            lambda name: (task, name),
            lambda name, result: f"seed {seed}: {name}: {result}",
        )
    yardstick = arguments.work / "yardstick"
    if not (yardstick / "real.npy").exists():
        training = (task, yardstick, arguments.labels, arguments.feature_steps, arguments.samples)
        say(f"feature network: {pool.submit(train_yardstick, *training).result()}")
    asked = asked_of(arguments)
    how = " ".join(map(str, asked.values()))
    of_file = {f"{contender.name} {how}": contender for contender in wanted}
    scores = run_missing(
        pool,
        Done(root / "scores"),
        of_file,
        judge,
        lambda name: (task, yardstick, of_file[name], asked, arguments.labels),
        lambda _, score: f"seed {seed}: {row(score)}",
    )
    return {
        "seed": seed,
        "scores": {contender.name: scores[name] for name, contender in of_file.items()},
        "networks": trained,
        "cpu_s": round(sum(one["cpu_s"] for one in (*trained.values(), *scores.values()))),
    }


def settings_of(arguments: argparse.Namespace, seed: int) -> Settings:
    """What decides the networks of a seed."""
    return Settings(
        arguments.data, arguments.preset, arguments.image_size, arguments.clusters, arguments.steps, seed
    )


def asked_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the contenders are sampled; None: as the run's recipe says."""
    return {
        "samples": arguments.samples,
        "steps": arguments.sampling_steps,
        "guidance_scale": arguments.guidance,
    }


def row(score: dict[str, Any]) -> str:
    """One judgement as a line."""
    fidelity = "" if score["fidelity"] is None else f", fidelity {score['fidelity']:.3f}"
    return (
        f"{score['name']}: FD {score['frechet_distance']:.3f}, precision {score['precision']:.3f}, "
        f"recall {score['recall']:.3f}{fidelity} ({score['cpu_s']:.0f} CPU s)"
    )


def distances(results: list[dict[str, Any]], name: str) -> list[float]:
    """Frechet distances of one contender, one a seed."""
    return [result["scores"][name]["frechet_distance"] for result in results]


def ratios(results: list[dict[str, Any]], ours: Iterable[str], against: str) -> list[float]:
    """The least distance of `ours` over that of `against`, one a seed."""
    best = [min(several) for several in zip(*(distances(results, name) for name in ours), strict=True)]
    return [mine / other for mine, other in zip(best, distances(results, against), strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def comparisons(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """What is held against the baseline and the control, and the ratios' spread over the seeds."""
    names = set(results[0]["scores"])
    rows = {f"best of Top-1 and Top-2, {router}": (f"top-1, {router}", f"top-2, {router}") for router in
            ("text-aware router", "published router")}  # fmt: skip
    rows |= {name: (name,) for name in results[0]["scores"] if name not in NOT_NETWORKS}
    return {
        title: {base: spread(ratios(results, ours, base)) for base in (BASELINE, CONTROL)}
        for title, ours in rows.items()
        if set(ours) <= names
    }


def ranged(values: list[float], digits: int = 2) -> str:
    """`median (least to most)`, or the value where there is one."""
    one = f"{statistics.median(values):.{digits}f}"
    return one if len(values) == 1 else f"{one} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Tables for the documentation: medians over the seeds, least and most in brackets."""
    seeds = ", ".join(str(result["seed"]) for result in results)
    example = results[0]["networks"]
    known = json.loads((arguments.work / "yardstick" / "yardstick.json").read_text())
    lines = [
        f"Seeds {seeds}; {example[BASELINE]['samples']} samples a side, {arguments.samples} images judged; "
        f"feature network's accuracy {known['accuracy']:.3f}; real against real {known['floor']:.2f}.",
        "",
        "| | Frechet distance | precision | recall | prompt fidelity | / monolithic | / control |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in results[0]["scores"]:
        cells = [name]
        for measure in MEASURES:
            values = [result["scores"][name][measure] for result in results]
            cells.append("-" if None in values else ranged(values, 2 if measure == MEASURES[0] else 3))
        cells += [ranged(ratios(results, [name], base)) for base in (BASELINE, CONTROL)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| networks | steps x batch | samples | held-out loss |", "| --- | --- | --- | --- |"]
    for name, one in example.items():
        losses = ranged([result["networks"][name]["heldout_loss"] for result in results], 3)
        lines.append(f"| {name} | {one['steps']} x {one['batch_size']} | {one['samples']} | {losses} |")
    return "\n".join(lines) + "\n"


def draw(work: Path, result: dict[str, Any]) -> None:
    """Real images and every contender's, a row each: below each other what the same prompt and noise gave."""
    from PIL import Image, ImageDraw

    folder = work / f"seed-{result['seed']}" / "pictures"
    strips = {name: Image.open(folder / f"{name}.png") for name in ("real", *result["scores"])}
    width, height = next(iter(strips.values())).size
    factor, head = max(1, round(48 / height)), 14
    sheet = Image.new("RGB", (width * factor, (height * factor + head) * len(strips)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for number, (name, strip) in enumerate(strips.items()):
        top = number * (height * factor + head)
        pen.text((2, top + 1), name, fill=(40, 40, 40))
        sheet.paste(
            strip.resize((width * factor, height * factor), Image.Resampling.NEAREST), (0, top + head)
        )
    sheet.save(work / f"grid-{result['seed']}.png", optimize=True)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON object's figures."""
    found = comparisons(results)
    text = found["best of Top-1 and Top-2, text-aware router"]
    free = found["best of Top-1 and Top-2, published router"]
    medians = {
        name: {
            measure: statistics.median(result["scores"][name][measure] for result in results)
            for measure in MEASURES
            if results[0]["scores"][name][measure] is not None
        }
        for name in results[0]["scores"]
    }
    return {
        "ratio": text[BASELINE]["median"],
        "ratio_spread": [text[BASELINE]["min"], text[BASELINE]["max"]],
        "ratio_control": text[CONTROL]["median"],
        "ratio_control_spread": [text[CONTROL]["min"], text[CONTROL]["max"]],
        "ratio_text_free": free[BASELINE]["median"],
        "ratio_control_text_free": free[CONTROL]["median"],
        "medians": medians,
        "ratios": found,
        "cpu_s": sum(result["cpu_s"] for result in results),
    }


def same_settings(arguments: argparse.Namespace) -> None:
    """Refuse a working folder of other networks."""
    wanted = {key: str(getattr(arguments, key)) for key in
              ("data", "preset", "image_size", "clusters", "steps", "labels", "feature_steps")}  # fmt: skip
    path = arguments.work / "settings.json"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise SystemExit(f"{arguments.work} holds another comparison ({path}): choose another --work")
    path.write_text(json.dumps(wanted))


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every seed, in turn."""
    same_settings(arguments)
    results = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for seed in arguments.seeds:
            results.append(one_seed(arguments, pool, seed))
            text = markdown(results, arguments)
            (arguments.work / "results.md").write_text(text)
            draw(arguments.work, results[-1])
            say(f"\n{text}")
    return results


def main() -> None:
    """Parse, run every seed, print."""
    keep = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep)
    parser.add_argument("--data", default="digits", help="as for prepare: a folder, tar, parquet, or digits")
    parser.add_argument("--labels", help="the key of metadata.jsonl that the feature network is to learn, "
                        "where captions are too many to be labels")  # fmt: skip
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="of an expert and of the router")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=500, help="images judged")
    parser.add_argument("--sampling-steps", type=int, help="default: the recipe's")
    parser.add_argument("--guidance", type=float, help="default: the recipe's")
    parser.add_argument("--feature-steps", type=int, default=300)
    parser.add_argument("--ddpm-every", type=int, default=0, metavar="N")
    parser.add_argument("--shared-start", action="store_true")
    parser.add_argument("--kept-rate", type=float, metavar="SHARE")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--knobs", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
        arguments.work = arguments.work or Path(temporary)
        results = run(arguments)
    options = {key: value for key, value in vars(arguments).items() if key != "work"}
    print(json.dumps({"benchmark": "quality", **options, **summary(results)}))


if __name__ == "__main__":
    main()
