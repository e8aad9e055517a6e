"""Tests of `paris_p2p.store.model_folder`. That its folders load and generate is tested with the pipeline."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from paris_p2p.errors import ConfigError, IncompleteError, StoreError
from paris_p2p.ids import ROUTER, Role, Term
from paris_p2p.store.model_folder import INDEX_NAME, WEIGHTS_NAME, refuse_foreign, write_model_folder
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.manifest import Architecture, SignedManifest, TensorSpec, sign_manifest
from tests.samples import ORGANISER, manifest, recipe, ref, variant

REF = ref(1)


def run_with_two_clusters() -> SignedManifest:
    expert = Architecture("PixArtTransformer2DModel", {"num_layers": 3}, (TensorSpec("a", "F32", (1,)),))
    router = Architecture("Router", {"clusters": 2}, ())
    chosen = recipe([variant(expert)], router, scheduler="unipc")
    two = manifest(recipe=chosen, components={"text_encoder": REF})
    return sign_manifest(two, ORGANISER)


SIGNED = run_with_two_clusters()


def statement(role: Role) -> CheckpointStatement:
    return CheckpointStatement(
        SIGNED.run_id, role, Term(2), ORGANISER.node_id, 4, 4, 0, REF, REF, b"", 0.25, 0.0
    )


@pytest.fixture
def items(tmp_path: Path) -> tuple[dict[Role, Path], dict[str, Path]]:
    weights = {}
    for role in SIGNED.manifest.roles:
        folder = tmp_path / "items" / role
        folder.mkdir(parents=True)
        (folder / WEIGHTS_NAME).write_bytes(role.encode())
        (folder / "config.json").write_text('{"num_layers": 1000000}')  # a stranger's: not to be used
        weights[role] = folder
    encoder = tmp_path / "items" / "text_encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    return weights, {"text_encoder": encoder}


def write(out: Path, items: tuple[dict[Role, Path], dict[str, Path]], *missing: str) -> Path:
    weights = {role: folder for role, folder in items[0].items() if role not in missing}
    return write_model_folder(out, SIGNED, weights, items[1], {role: statement(role) for role in weights})


def test_the_layout_is_that_of_a_diffusers_folder(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]]
) -> None:
    out = write(tmp_path / "deep" / "model", items)
    index = json.loads((out / INDEX_NAME).read_text())
    assert index["_class_name"] == "ParisPipeline"
    assert index["expert_1"] == ["diffusers", "PixArtTransformer2DModel"]
    assert index["router"] == ["paris_p2p.diffusion.router", "Router"]
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    assert index["objectives"] == {"expert_0": "flow_matching", "expert_1": "flow_matching"}
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["use_flow_sigmas"] is True
    paris = json.loads((out / "paris.json").read_text())
    assert paris["run_id"] == SIGNED.run_id.hex()
    assert paris["roles"]["expert-1"]["heldout_loss"] == 0.25
    assert paris["missing"] == []


def test_weights_are_hard_links_and_configs_the_manifest_s(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]]
) -> None:
    out = write(tmp_path / "model", items)
    weights = out / "expert_0" / WEIGHTS_NAME
    assert weights.samefile(items[0][Role("expert-0")] / WEIGHTS_NAME)
    assert not weights.is_symlink()
    config = json.loads((out / "expert_0" / "config.json").read_text())
    assert (config["_class_name"], config["num_layers"]) == ("PixArtTransformer2DModel", 3)


def test_where_links_are_impossible_files_are_copied(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path, *, follow_symlinks: bool) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr("os.link", refuse)
    out = write(tmp_path / "model", items)
    assert (out / "router" / WEIGHTS_NAME).read_bytes() == b"router"


def test_missing_roles_are_listed(tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]]) -> None:
    out = write(tmp_path / "model", items, "expert-0", ROUTER)
    assert json.loads((out / INDEX_NAME).read_text())["missing"] == ["expert_0", "router"]
    assert json.loads((out / "paris.json").read_text())["missing"] == ["expert-0", "router"]
    assert not (out / "expert_0").exists()


def test_no_expert_or_a_missing_component_is_no_model(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]]
) -> None:
    with pytest.raises(IncompleteError, match="experts"):
        write(tmp_path / "model", items, "expert-0", "expert-1")
    with pytest.raises(IncompleteError, match="text_encoder"):
        write(tmp_path / "model", (items[0], {}))
    assert not (tmp_path / "model").exists()


def test_a_model_is_replaced_and_nothing_else_is(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]]
) -> None:
    out = write(tmp_path / "model", items)
    write(out, items, "expert-0")
    assert not (out / "expert_0").exists()
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a model"):
        write(precious, items)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items", "model", "thesis"]


def test_a_failure_leaves_the_old_model(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]]
) -> None:
    out = write(tmp_path / "model", items)
    (items[0][Role("expert-1")] / WEIGHTS_NAME).unlink()
    with pytest.raises(StoreError, match="cannot be written"):
        write(out, items)
    assert (out / "expert_1" / WEIGHTS_NAME).read_bytes() == b"expert-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items", "model"]


def test_a_model_that_cannot_be_replaced_is_put_back(
    tmp_path: Path, items: tuple[dict[Role, Path], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "model", items, "expert-1")
    before = (out / INDEX_NAME).read_bytes()
    rename = Path.rename

    def refuses(path: Path, target: Path) -> Path:
        if target == out and path.name.startswith(".model-"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(StoreError, match="cannot be written"):
        write(out, items)
    assert (out / INDEX_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_it_needs_no_torch() -> None:
    code = "import sys, paris_p2p.store.model_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_empty_folder_and_none_are_free_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    refuse_foreign(tmp_path / "empty")
    refuse_foreign(tmp_path / "none")
    with pytest.raises(ConfigError, match="file exists and is not a model"):
        refuse_foreign(tmp_path / "file")
