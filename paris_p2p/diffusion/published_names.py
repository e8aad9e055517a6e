"""Published tensor names against those of a run's own experts (diffusers' PixArt transformer).

Owns: the table. Does not own: files (`published`, `export`), what is done with a tensor that has no
counterpart (`initial`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def published_to_pixart(layers: int) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(published prefix, PixArt prefixes that make it, concatenated) of everything with weight and bias."""
    yield "patch_embed", ("pos_embed.proj",)
    yield "time_embed.mlp.0", ("adaln_single.emb.timestep_embedder.linear_1",)
    yield "time_embed.mlp.2", ("adaln_single.emb.timestep_embedder.linear_2",)
    yield "t_block.1", ("adaln_single.linear",)
    yield "text_proj.0", ("caption_projection.linear_1",)
    yield "text_proj.2", ("caption_projection.linear_2",)
    yield "final_layer.linear", ("proj_out",)
    for n in range(layers):
        block = f"transformer_blocks.{n}"
        for published, own in (("attn", "attn1"), ("cross_attn", "attn2")):
            inputs = tuple(f"{block}.{own}.to_{part}" for part in "qkv")
            yield f"layers.{n}.{published}.in_proj", inputs
            yield f"layers.{n}.{published}.out_proj", (f"{block}.{own}.to_out.0",)
        yield f"layers.{n}.mlp.0", (f"{block}.ff.net.0.proj",)
        yield f"layers.{n}.mlp.2", (f"{block}.ff.net.2",)


def tables_to_pixart(layers: int) -> Iterable[tuple[str, str]]:
    """(published name, PixArt name) of the modulation tables."""
    yield "final_layer.scale_shift_table", "scale_shift_table"
    for n in range(layers):
        yield f"layers.{n}.scale_shift_table", f"transformer_blocks.{n}.scale_shift_table"


def published_name(prefix: str, kind: str) -> str:
    """The tensor `kind` (`weight`, `bias`) of a published prefix."""
    return f"{prefix}_{kind}" if prefix.endswith("in_proj") else f"{prefix}.{kind}"


def as_published(own: nn.Module) -> dict[str, Tensor]:
    """The tensors of a run's own expert under published names: projections fused, positions a tensor.

    Its two layers over the text become `text_proj.0` and `text_proj.2`: the published layout has one."""
    positions = dict(own.named_buffers())["pos_embed.pos_embed"]
    return published_tensors(own.state_dict()) | {"pos_embed": positions}


def published_tensors(pixart: dict[str, Tensor]) -> dict[str, Tensor]:
    """PixArt tensors under published names, as far as all parts of one are there."""
    blocks = (name.split(".")[1] for name in pixart if name.startswith("transformer_blocks."))
    layers = 1 + max(map(int, blocks), default=-1)
    tensors: dict[str, Tensor] = {}
    for published, parts in published_to_pixart(layers):
        for kind in ("weight", "bias"):
            pieces = [pixart[f"{part}.{kind}"] for part in parts if f"{part}.{kind}" in pixart]
            if len(pieces) == len(parts):
                tensors[published_name(published, kind)] = torch.cat(pieces)
    tables = tables_to_pixart(layers)
    return tensors | {published: pixart[table] for published, table in tables if table in pixart}


def as_pixart(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an expert in the published layout under PixArt names, as far as they have one.

    A single text projection has none, and the positions are no PixArt parameter: both are left out."""
    layers = 1 + max((int(n.split(".")[1]) for n in published if n.startswith("layers.")), default=-1)
    tensors: dict[str, Tensor] = {}
    for name, parts in published_to_pixart(layers):
        for kind in ("weight", "bias"):
            whole = published.get(published_name(name, kind))
            if whole is not None and whole.ndim > 0:
                pieces = whole.chunk(len(parts))
                tensors |= {f"{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return tensors | {own: published[name] for name, own in tables_to_pixart(layers) if name in published}
