"""Tests of `paris_p2p.diffusion.pipeline`, `generate` and `grid`, on a folder as fetch-model writes it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from paris_p2p.diffusion.generate import Generated, Progress, Request, generate, load
from paris_p2p.diffusion.grid import GAP, LABEL_HEIGHT, grid
from paris_p2p.diffusion.pipeline import ParisPipeline
from paris_p2p.diffusion.resume import save_weights
from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import ROUTER, Role, Term
from paris_p2p.store.model_folder import write_model_folder
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import SignedManifest

from .conftest import CLUSTERS, ORGANISER, some_ref, toy_manifest, toy_recipe, toy_trainer

MakeModel = Callable[..., Path]


def statement(signed: SignedManifest, role: Role) -> CheckpointStatement:
    return CheckpointStatement(
        run_id=signed.run_id,
        role=role,
        term=Term(1),
        holder=ORGANISER.node_id,
        step=3,
        total_steps=8,
        variant=0,
        weights=some_ref(50),
        resume=some_ref(51),
        parent=b"",
        heldout_loss=0.5,
        created_unix=0.0,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Role, Path]:
    """Weights items of every role, a few steps into training."""
    root, recipe = tmp_path_factory.mktemp("weights"), toy_recipe()
    items = {}
    for role in toy_manifest(recipe).manifest.roles:
        trainer = toy_trainer(recipe, role)
        for _ in range(6):
            trainer.train_step()
        save_weights(trainer, root / role)
        items[role] = root / role
    return items


@pytest.fixture
def make_model(
    tmp_path: Path, trained: dict[Role, Path], make_components: Callable[[], dict[str, Path]]
) -> MakeModel:
    def make(*missing: str) -> Path:
        signed = toy_manifest(toy_recipe())
        weights = {role: item for role, item in trained.items() if role not in missing}
        statements = {role: statement(signed, role) for role in weights}
        return write_model_folder(tmp_path / "model", signed, weights, make_components(), statements)

    return make


def test_three_lines_make_an_image(make_model: MakeModel) -> None:
    pipe = ParisPipeline.from_pretrained(make_model())
    image = pipe("seven").images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (8, 8)
    assert set(pipe.experts_used) == {"expert_0", "expert_1"}
    assert sum(pipe.experts_used.values()) == 20 * CLUSTERS  # 20 steps, Top-2


def test_saving_and_loading_keeps_every_image(make_model: MakeModel, tmp_path: Path) -> None:
    pipe = ParisPipeline.from_pretrained(make_model())
    pipe.save_pretrained(tmp_path / "copy")
    again = ParisPipeline.from_pretrained(str(tmp_path / "copy"))
    assert dict(again.config)["sampling"] == dict(pipe.config)["sampling"]
    first, second = (p(["seven", "eight"], seed=5, output_type="pt").images for p in (pipe, again))
    assert torch.equal(first, second)
    written = {path.name for path in (tmp_path / "copy").iterdir()}
    expected = {
        "model_index.json",
        "expert_0",
        "expert_1",
        "router",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }
    assert written == expected


def test_the_same_seed_gives_the_same_image_whatever_else_is_asked_for(make_model: MakeModel) -> None:
    pipe = ParisPipeline.from_pretrained(make_model())
    alone = pipe("seven", seed=3, output_type="pt").images
    four = pipe("seven", num_images_per_prompt=4, seed=3, output_type="pt").images
    other = pipe(["eight", "seven"], seed=3, output_type="pt").images
    assert torch.allclose(alone[0], four[0], atol=1e-5)
    assert torch.allclose(alone[0], other[1], atol=1e-5)
    assert not torch.allclose(four[0], four[1], atol=1e-2)
    assert torch.equal(alone, pipe("seven", seed=3, output_type="pt").images)


def test_prompts_guidance_and_schedulers_matter(make_model: MakeModel) -> None:
    pipe = ParisPipeline.from_pretrained(make_model())
    base = pipe("seven", seed=1, output_type="latent").images
    assert not torch.equal(base, pipe("eight", seed=1, output_type="latent").images)
    assert not torch.equal(base, pipe("seven", seed=1, guidance_scale=5.0, output_type="latent").images)
    for scheduler in ("heun", "unipc", "dpm"):
        found = pipe("seven", seed=1, scheduler=scheduler, output_type="latent").images
        assert bool(torch.isfinite(found).all())
        assert not torch.equal(base, found)


def test_a_partial_model_generates_with_the_experts_it_has(make_model: MakeModel) -> None:
    folder = make_model("expert-0")
    pipe = ParisPipeline.from_pretrained(folder)
    assert list(pipe.experts) == [1]
    assert pipe.config["missing"] == ["expert_0"]
    pipe("seven")
    assert pipe.experts_used == {"expert_1": 20}
    assert json.loads((folder / "paris.json").read_text())["missing"] == ["expert-0"]


def test_an_expert_may_be_left_out_by_hand(make_model: MakeModel) -> None:
    pipe = ParisPipeline.from_pretrained(make_model(), expert_1=None)
    pipe("seven")
    assert pipe.experts_used == {"expert_0": 20}


def test_a_model_without_router_mixes_its_experts_evenly(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = ParisPipeline.from_pretrained(make_model(ROUTER))
    assert pipe("seven", top_k=1).images
    assert pipe.experts_used == {"expert_0": 20, "expert_1": 20}
    assert "router is missing" in caplog.text
    assert ParisPipeline.from_pretrained(make_model(ROUTER, "expert-1"))("seven").images


def test_a_lazy_expert_is_loaded_when_it_is_first_given_weight(make_model: MakeModel) -> None:
    folder, seen = make_model(), list[tuple[int, int, str]]()
    eager = ParisPipeline.from_pretrained(folder)
    lazy = ParisPipeline.from_pretrained(folder, lazy_experts=True, on_part=lambda *part: seen.append(part))
    assert lazy.present == [0, 1]
    assert {name for _, _, name in seen} == {"router", "scheduler", "text_encoder", "tokenizer", ""}
    assert seen[-1] == (4, 4, "")

    def draw(pipe: ParisPipeline) -> torch.Tensor:
        images: torch.Tensor = pipe(
            "seven", seed=2, num_inference_steps=1, top_k=1, output_type="latent"
        ).images
        return images

    assert torch.equal(draw(lazy), draw(eager))
    assert lazy.experts_used == eager.experts_used
    used = [name for name, calls in lazy.experts_used.items() if calls]
    assert len(used) == 1  # one step, Top-1
    assert [name for name in lazy.components if name.startswith("expert")] == used
    assert seen[5:] == [(4, 5, used[0]), (5, 5, "")]


def test_lazy_experts_draw_the_same_images_and_are_loaded_once(make_model: MakeModel) -> None:
    folder, seen = make_model(), list[str]()
    eager = ParisPipeline.from_pretrained(folder)
    lazy = ParisPipeline.from_pretrained(
        folder, lazy_experts=True, on_part=lambda done, total, name: seen.append(name)
    )
    for seed in (1, 2):
        images = [pipe(["seven", "eight"], seed=seed, output_type="pt").images for pipe in (lazy, eager)]
        assert torch.equal(*images)
    assert [seen.count(f"expert_{k}") for k in (0, 1)] == [1, 1]


def test_a_lazy_expert_is_loaded_by_name_and_by_saving(make_model: MakeModel, tmp_path: Path) -> None:
    pipe = ParisPipeline.from_pretrained(make_model(), lazy_experts=True)
    network = pipe.expert_1
    assert isinstance(network, torch.nn.Module)
    assert not network.training
    assert pipe.expert_1 is pipe.experts[1] is network
    with pytest.raises(AttributeError, match="expert_7"):
        _ = pipe.expert_7
    again = ParisPipeline.from_pretrained(make_model(), lazy_experts=True)
    again.expert_1 = None
    assert again.present == [0]
    again.save_pretrained(tmp_path / "copy")
    assert ParisPipeline.from_pretrained(tmp_path / "copy").present == [0]


def test_a_missing_lazy_expert_is_named_at_once_a_damaged_one_when_it_is_needed(
    make_model: MakeModel,
) -> None:
    folder = make_model()
    weights = folder / "expert_1" / "diffusion_pytorch_model.safetensors"
    weights.unlink()  # it is a hard link: writing through it would damage its source
    weights.write_bytes(b"\0" * 100)
    pipe = ParisPipeline.from_pretrained(folder, lazy_experts=True)
    assert pipe.expert_0 is not None
    with pytest.raises(ConfigError, match="expert_1 cannot be loaded"):
        _ = pipe.expert_1
    weights.unlink()
    (folder / "expert_1" / "config.json").unlink()
    (folder / "expert_1").rmdir()
    with pytest.raises(ConfigError, match="expert_1 is missing"):
        ParisPipeline.from_pretrained(folder, lazy_experts=True)


def test_a_memory_limit_changes_no_image(make_model: MakeModel) -> None:
    folder = make_model()
    whole = ParisPipeline.from_pretrained(folder)
    sizes = {name: shelved.size for name, shelved in limited(folder, 10**9).resident.shelf.items()}
    assert set(sizes) == {"expert_0", "expert_1", "router", "text_encoder"}
    one = max(sizes["expert_0"] + sizes["router"], sizes["text_encoder"])
    for budget in (one, sum(sizes.values())):
        pipe = limited(folder, budget)
        images = [p(["seven", "eight"], seed=4, output_type="latent").images for p in (whole, pipe)]
        assert torch.equal(*images)
        assert pipe.experts_used == whole.experts_used
        assert pipe.resident.peak <= budget
        assert pipe.resident.loads["router"] == 1
    assert pipe.resident.loads["expert_1"] == 1  # everything fits
    bounded = limited(folder, one)
    bounded("seven", num_inference_steps=4, top_k=0)
    # Both experts at every step, one at a time: the one in memory goes first, so that each step loads one.
    assert sum(bounded.resident.loads[f"expert_{k}"] for k in (0, 1)) == 5
    assert "text_encoder" not in bounded.components


def limited(folder: Path, budget: int) -> ParisPipeline:
    return ParisPipeline.from_pretrained(folder, max_memory=budget)


def test_a_memory_limit_that_cannot_be_kept_says_what_would_do(make_model: MakeModel) -> None:
    folder = make_model()
    with pytest.raises(ConfigError, match="give at least"):
        limited(folder, 1000)("seven")


def test_a_limited_model_is_saved_whole(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    pipe = limited(folder, 10**9)
    pipe.save_pretrained(tmp_path / "copy")
    first, second = (
        ParisPipeline.from_pretrained(path)("seven", seed=1, output_type="latent").images
        for path in (folder, tmp_path / "copy")
    )
    assert torch.equal(first, second)


def test_half_precision_draws_nearly_the_same(make_model: MakeModel) -> None:
    folder = make_model()
    images = [
        ParisPipeline.from_pretrained(folder, torch_dtype=dtype)(
            "seven", seed=2, num_inference_steps=4, guidance_scale=1.0, top_k=0, output_type="latent"
        ).images
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert images[1].dtype == torch.float32
    assert torch.allclose(images[0], images[1], atol=0.05)
    assert not torch.equal(*images)


def test_routing_may_be_by_threshold(make_model: MakeModel) -> None:
    pipe = ParisPipeline.from_pretrained(make_model())
    every = pipe("seven", seed=1, top_k=0, output_type="latent").images
    assert torch.equal(every, pipe("seven", seed=1, threshold=0.0, output_type="latent").images)
    best = pipe("seven", seed=1, top_k=1, output_type="latent").images
    assert torch.equal(best, pipe("seven", seed=1, threshold=1.0, output_type="latent").images)
    assert sum(pipe.experts_used.values()) == 20
    with pytest.raises(ConfigError, match="threshold"):
        pipe("seven", threshold=1.5)


def test_a_missing_text_encoder_is_named_when_it_is_needed(make_model: MakeModel) -> None:
    pipe = ParisPipeline.from_pretrained(make_model(), text_encoder=None)
    with pytest.raises(ConfigError, match="text_encoder"):
        pipe("seven")


def test_a_folder_that_is_no_model_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fetch-model"):
        ParisPipeline.from_pretrained(tmp_path / "nowhere")
    folder = make_model()
    index = json.loads((folder / "model_index.json").read_text())
    index["router"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="unknown class"):
        ParisPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ConfigError, match="damaged"):
        ParisPipeline.from_pretrained(folder)


def test_a_damaged_weights_file_is_named(make_model: MakeModel) -> None:
    folder = make_model()
    weights = folder / "expert_1" / "diffusion_pytorch_model.safetensors"
    weights.unlink()  # it is a hard link: writing through it would damage its source
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="expert_1 cannot be loaded"):
        ParisPipeline.from_pretrained(folder)


@pytest.fixture
def generated(make_model: MakeModel, tmp_path: Path) -> tuple[Generated, list[Progress]]:
    seen: list[Progress] = []
    request = Request(("seven", "eight!"), count=2, seed=9, steps=3, scheduler="heun", device="cpu")
    return generate(make_model(), request, tmp_path / "images", on_progress=seen.append), seen


def test_generating_writes_images_with_their_parameters(generated: tuple[Generated, list[Progress]]) -> None:
    result, seen = generated
    assert [path.name for path in result.paths] == [
        "00-seven-9.png",
        "00-seven-10.png",
        "01-eight-9.png",
        "01-eight-10.png",
    ]
    with Image.open(result.paths[3]) as image:
        text = image.text  # type: ignore[attr-defined]  # PNG images have it
    assert (text["prompt"], text["seed"], text["steps"]) == ("eight!", "10", "3")
    assert (text["scheduler"], text["guidance"], text["top_k"]) == ("heun", "2.0", "2")
    assert json.loads(text["experts"]) == result.experts
    assert len(text["run_id"]) == 64
    assert seen[-1] == Progress("sample", 5, 5)
    assert {event.item for event in seen if event.phase == "load"} >= {"router", "expert_0", "tokenizer"}


def test_generating_several_images_makes_a_grid(generated: tuple[Generated, list[Progress]]) -> None:
    result, _ = generated
    assert result.grid is not None
    with Image.open(result.grid) as sheet:
        assert sheet.size == (2 * (96 + GAP) + GAP, 2 * (96 + LABEL_HEIGHT + GAP) + GAP)


def test_one_image_may_be_given_a_file(make_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "seven.png"
    result = generate(make_model(), Request(("seven",), steps=1, device="cpu"), path)
    assert (result.paths, result.grid) == ((path,), None)
    with Image.open(path) as image:
        assert image.size == (8, 8)
    assert [p.name for p in path.parent.iterdir()] == ["seven.png"]


def test_one_image_gets_the_grid_that_was_asked_for(make_model: MakeModel, tmp_path: Path) -> None:
    path, sheet = tmp_path / "seven.png", tmp_path / "sheet.png"
    result = generate(make_model(), Request(("seven",), steps=1, device="cpu"), path, grid_path=sheet)
    assert result.grid == sheet
    assert sheet.is_file()


@pytest.mark.parametrize("request_", [Request(("seven",), count=2), Request(("seven", "eight"))])
def test_several_images_do_not_fit_a_file(request_: Request, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give a folder .* --grid"):
        generate(tmp_path / "not even read", request_, tmp_path / "image.png")


@pytest.mark.parametrize(("limit", "threads"), [(10**9, 1), (1, 2)])
def test_small_networks_are_given_one_thread_before_any_expert_is_loaded(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, limit: int, threads: int
) -> None:
    monkeypatch.setattr("paris_p2p.diffusion.generate.SMALL_PARAMETERS", limit)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pipe = load(make_model(), Request(("seven",), device="cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert not [name for name in pipe.components if name.startswith("expert")]


def test_images_that_cannot_be_written_are_the_operator_s_business(
    make_model: MakeModel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        generate(make_model(), Request(("seven",), steps=1, device="cpu"), tmp_path / "file")


def test_a_grid_enlarges_small_images_without_blurring_them() -> None:
    black, white = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    sheet = grid([black, white, white], 2, ["one", "zwei – ä"])
    assert sheet.getpixel((GAP + 95, GAP + LABEL_HEIGHT + 95)) == (0, 0, 0)
    assert sheet.size[1] == 2 * (96 + LABEL_HEIGHT + GAP) + GAP
