"""`paris-node export-model`: write a model in the published folder layout. Needs no network."""

from pathlib import Path

from paris_node.bars import count_bars
from paris_node.commands.generate import chosen_model
from paris_node.torch_cache import keep_torch_cache
from paris_p2p.errors import ConfigError
from paris_p2p.programs import Output
from paris_p2p.store.home import Home


def run(model: Path | None, out: Path, dtype: str, home_folder: Path | None, output: Output) -> None:
    """Export `model` (default: the last fetched) to the new folder `out`."""
    home = Home.resolve(home_folder)
    source = chosen_model(model, home)
    keep_torch_cache(home)
    from paris_p2p.diffusion.export import export
    from paris_p2p.diffusion.generate import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    with count_bars(output) as bars:
        made = export(source, out, DTYPES[dtype], lambda done, total, _: bars.show("exporting", done, total))
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
