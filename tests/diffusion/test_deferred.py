"""A package's `__init__` waits until the package itself is asked; modules below it do not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paris_p2p.diffusion.deferred import defer

INIT = "ran = True\nfrom heavy.inner.wanted import name\n"


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `heavy.inner` with a module `wanted`."""
    folder = tmp_path / "heavy" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text(INIT)
    (folder / "wanted.py").write_text("name = 'wanted'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "heavy"]:
        del sys.modules[name]


@pytest.mark.usefixtures("heavy")
def test_a_module_below_is_imported_without_the_packages_init() -> None:
    defer("heavy.inner")
    wanted = __import__("heavy.inner.wanted", fromlist=["name"])
    assert wanted.name == "wanted"
    assert "ran" not in vars(sys.modules["heavy.inner"])


@pytest.mark.usefixtures("heavy")
def test_a_name_of_the_package_itself_runs_its_init_once() -> None:
    defer("heavy.inner")
    inner = sys.modules["heavy.inner"]
    with pytest.raises(AttributeError, match="__all__"):
        inner.__all__  # noqa: B018 - looked up by inspection, which loads nothing
    assert (inner.name, inner.ran) == ("wanted", True)
    with pytest.raises(AttributeError, match="other"):
        inner.other  # noqa: B018 - looked up on purpose
    defer("heavy.inner")
    assert sys.modules["heavy.inner"] is inner and inner.ran


def test_a_package_that_is_not_there_is_left_to_the_import() -> None:
    defer("json.nothing_here")
    defer("json.decoder")
    assert "json.nothing_here" not in sys.modules


def test_the_trainer_imports_neither_the_other_transformers_nor_torchvision() -> None:
    code = (
        "import sys, paris_p2p.diffusion.training; "
        "print([n for n in ('torchvision', 'scipy.stats', 'diffusers.models.transformers.transformer_flux',"
        " 'diffusers.models.unets', 'diffusers.pipelines.pipeline_utils') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
