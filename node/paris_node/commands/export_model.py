"""`paris-node export-model`: write a model in the published folder layout. Needs no network."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paris_node.commands.generate import remembered_model
from paris_node.torch_cache import keep_torch_cache
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home


def run(model: Path | None, out: Path, dtype: str, home_folder: Path | None, output: Output) -> None:
    """Export `model` (default: the last fetched) to the new folder `out`."""
    home = Home.resolve(home_folder)
    source = model if model is not None else remembered_model(home)
    keep_torch_cache(home)
    from paris_p2p.diffusion.export import export
    from paris_p2p.diffusion.generate import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=output.as_json) as progress:
        bar = progress.add_task("exporting", total=None)
        made = export(
            source,
            out,
            DTYPES[dtype],
            lambda done, total, part: progress.update(bar, completed=done, total=total),
        )
    lines = [f"{len(made.parts)} parts in {made.folder}: {', '.join(made.parts)}"]
    if made.extended:
        lines.append(
            f"{', '.join(made.extended)}: two layers over the text (text_proj.0, text_proj.2) where Paris "
            "has one: other programs need to know"
        )
    output.event(
        "exported",
        "\n".join(lines),
        path=str(made.folder.resolve()),
        parts=list(made.parts),
        extended=list(made.extended),
    )
