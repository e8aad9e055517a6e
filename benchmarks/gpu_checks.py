"""Every check that needs a GPU, in one command: `python benchmarks/gpu_checks.py`. docs/gpu.md lists them.

Each check is a process of its own and gives one JSON line: its figures, the bars it `missed`, the `seconds`
it took. The last line sums up; `ratio` is the share of checks that ran and missed nothing. After `--budget`
seconds no further check begins (`skipped`): call again with `--only` and their names. The order is by worth.
`--small --device cpu` runs all of them with the smallest networks, to see that they work. Without a GPU, and
without `--device`, nothing is run.

    python benchmarks/gpu_checks.py [--only train_b2,oom] [--budget 570] [--list]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paris_p2p import clock

HERE = Path(__file__).resolve().parent
Figures = dict[str, Any]
TAIL = 600


@dataclass(frozen=True, slots=True)
class Check:
    """`commands` run one after another; the last one's last line is its JSON. `missed`: the bars that these
    figures miss, in words."""

    name: str
    commands: list[list[str]]
    missed: Callable[[Figures], list[str]] = lambda _: []
    timeout_s: float = 300.0


def at_least(name: str, bar: float) -> Callable[[Figures], list[str]]:
    """The figure `name` must be `bar` or more, where there is one."""
    return lambda found: [f"{name} {found[name]} < {bar}"] if _figure(found, name, bar) < bar else []


def at_most(name: str, bar: float) -> Callable[[Figures], list[str]]:
    """The figure `name` must be `bar` or less, where there is one."""
    return lambda found: [f"{name} {found[name]} > {bar}"] if _figure(found, name, bar) > bar else []


def _figure(found: Figures, name: str, otherwise: float) -> float:
    value = found.get(name)
    return otherwise if value is None else float(value)


def all_of(*bars: Callable[[Figures], list[str]]) -> Callable[[Figures], list[str]]:
    """Everything that any of them misses."""
    return lambda found: [text for bar in bars for text in bar(found)]


def checks(given: argparse.Namespace, work: Path) -> Iterator[Check]:
    """All of them, the most telling first."""
    small, device = given.small, given.device
    yield Check("tests", [["-m", "pytest", "-m", "gpu", "-q", "-n", "0", "-p", "no:cacheprovider", "tests"]])
    for compiled in (False, True):
        for preset, batch in (("b2", 256), ("xl2", 128)):
            yield train_step(preset, batch, compiled, small, device)
    for preset in ("b2", "xl2"):
        yield Check(f"sampling_{preset}", [sampling(preset, "memory", small, device)], at_most("ratio", 2.2))
    held = all_of(at_most("memory_ratio", 1.0), at_least("same_images", 1))
    yield Check("offload", [[*sampling("b2", "time", small, device), "--offload", "--clusters", "4"]], held)
    yield Check("oom", [["-m",
                "benchmarks.gpu_checks", "--child", "oom", "--device", device,
                         *(["--small"] if small else [])]], at_least("shrunk", 1))  # fmt: skip
    yield Check("loop", loop(work, device, "5" if small else "60"), timeout_s=400.0)


def train_step(preset: str, batch: int, compiled: bool, small: bool, device: str) -> Check:
    """Our step against a plain loop's: speed, utilisation, and memory beside the estimate."""
    name = f"train_{preset}" + ("_compiled" if compiled else "")
    command = [str(HERE / "train_step.py"), "--preset", "tiny" if small else preset, "--device", device]
    command += ["--batch-size", str(8 if small else batch), "--precision", "bf16"]
    sizes = (
        ["--warmup", "1", "--steps", "1", "--rounds", "1"] if small else ["--warmup", "5", "--steps", "10"]
    )
    command += [*sizes, *([] if small else ["--rounds", "4"]), *(["--compile"] if compiled else [])]
    bars = all_of(
        at_least("ratio", 1.0),
        at_least("model_flops_utilisation", 0.45),
        at_least("memory_ratio", 0.85),
        at_most("memory_ratio", 1.15),
    )
    return Check(name, [command], at_least("ratio", 0.0) if small else bars)


def sampling(preset: str, skip: str, small: bool, device: str) -> list[str]:
    """`sampling.py` without one of its parts."""
    command = [str(HERE / "sampling.py"), "--preset", "tiny" if small else preset, "--device", device]
    sizes = ["--batch", "2", "--steps", "2", "--repeats", "1"] if small else ["--repeats", "5"]
    return [*command, *sizes, "--dtype", "bf16", "--skip", skip]


def loop(work: Path, device: str, steps: str) -> list[list[str]]:
    """A little run on the device: `steps` of training, images in bf16 within a limit, evaluation."""
    node = ["-m", "paris_node"]
    run, model, home = str(work / "run"), str(work / "model"), ["--home", str(work / "home")]
    return [
        [*node, "prepare", "digits", "--out", run, "--steps", steps, "--device", device, *home],
        [*node, "train-monolithic", run, "--out", model, "--device", device, *home],
        [*node, "generate", "a handwritten digit seven", "--n", "4", "--model", model, "--dtype", "bf16",
         "--max-memory", "20MB", "--offload", "--device", device, "--out", str(work / "images"), *home],
        [*node, "evaluate", run, "--model", model, "--samples", "200", "--out", str(work / "evaluation"),
         "--device", device, "--json", *home],
    ]  # fmt: skip


def perform(check: Check) -> Figures:
    """Run it; its figures."""
    began = clock.monotonic()
    found: Figures = {"check": check.name}
    try:
        for command in check.commands:
            left = check.timeout_s - (clock.monotonic() - began)
            done = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                timeout=max(1.0, left),
                cwd=HERE.parent,
            )
            if done.returncode not in (0, 5):  # 5: pytest found no test
                text = (done.stderr or done.stdout)[-TAIL:]
                return {
                    **found,
                    "missed": [f"exit status {done.returncode}: {text}"],
                    "seconds": since(began),
                }
        found |= last_object(done.stdout)
        missed = check.missed(found)
    except subprocess.TimeoutExpired:
        missed = [f"not done after {check.timeout_s:.0f} s"]
    return {**found, "missed": missed, "seconds": since(began)}


def since(began: float) -> float:
    """Seconds since `began`."""
    return round(clock.monotonic() - began, 1)


def last_object(text: str) -> Figures:
    """The JSON object in the last line; else what that line says."""
    lines = text.strip().splitlines() or [""]
    try:
        found = json.loads(lines[-1])
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"said": lines[-1][-TAIL:]}


def out_of_memory(device: str, small: bool) -> Figures:
    """A step for which the allocator has less than the trainer was told: it must shrink and go on."""
    from benchmarks import train_step as benchmark
    from paris_p2p.diffusion import memory

    given = argparse.Namespace(preset="tiny" if small else "b2", batch_size=16 if small else 256,
                               precision="bf16", compile=False)  # fmt: skip
    recipe = benchmark.recipe_for(given)
    trainer = benchmark.ours(recipe, benchmark.shard_for(recipe), device, None)
    trainer.memory_plan = first = memory.StepPlan(given.batch_size, False)
    if trainer.device.type == "cuda":
        total = torch.cuda.get_device_properties(trainer.device).total_memory
        torch.cuda.set_per_process_memory_fraction(16e9 / total)  # b2 in bf16: 2.4 GB and 165 MB an image
    else:
        trainer._shrink()  # nothing limits a CPU's allocator
    losses = [float(trainer.train_step()) for _ in range(2)]
    plan = trainer.memory_plan
    return {
        "shrunk": int(plan != first),
        "micro_batch": plan.micro_batch,
        "checkpointing": plan.checkpointing,
        "losses": losses,
    }


def run(given: argparse.Namespace) -> int:
    """All checks that were asked for."""
    began, results = clock.monotonic(), list[Figures]()
    wanted = set(given.only.split(",")) if given.only else None
    with tempfile.TemporaryDirectory() as folder:
        chosen = [one for one in checks(given, Path(folder)) if wanted is None or one.name in wanted]
        for check in chosen:
            late = clock.monotonic() - began > given.budget
            found = {"check": check.name, "skipped": "out of time"} if late else perform(check)
            results.append(found)
            print(json.dumps(found), flush=True)
    ran = [one for one in results if "skipped" not in one]
    good = [one for one in ran if not one["missed"]]
    skipped = [one["check"] for one in results if "skipped" in one]
    ratio = round(len(good) / max(1, len(ran)), 3)
    print(json.dumps({"benchmark": "gpu_checks", "device": device_name(given.device), "ran": len(ran),
                      "missed": [one["check"] for one in ran if one["missed"]], "skipped": skipped,
                      "seconds": since(began), "ratio": ratio}))  # fmt: skip
    return 0 if len(good) == len(ran) else 1


def device_name(device: str) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description="every check that needs a GPU")
    parser.add_argument("--device", help="default: cuda")
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds after which no check begins")
    parser.add_argument("--small", action="store_true", help="the smallest networks")
    parser.add_argument("--list", action="store_true", help="name the checks, run none")
    parser.add_argument("--child", choices=["oom"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device is None and not torch.cuda.is_available():
        given.device = "cpu"
        if not given.list:
            print(json.dumps({"skipped": "there is no GPU; --small --device cpu shows that the checks work"}))
            return 0
    given.device = given.device or "cuda"
    if given.child:
        print(json.dumps(out_of_memory(given.device, given.small)))
        return 0
    if given.list:
        for check in checks(given, Path("WORK")):
            for command in check.commands:
                print(f"{check.name}: python {' '.join(command)}")
        return 0
    return run(given)


if __name__ == "__main__":
    sys.exit(main())
