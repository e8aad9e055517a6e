"""The tokenizer: CLIP's byte-pair encoding, optionally with its vocabulary reduced to what a run uses.

Owns: the mapping from text to token ids and its file `tokenizer_config.json`. Does not own: the merges, which
ship inside the open_clip package.

CLIP's vocabulary has 49,408 tokens, so a small text tower would be almost all embedding table. A reduced
vocabulary keeps the tokens named at its making, every single-byte token and the two special ones. A token
that was not kept is spelled by the two it is merged from, and so on down to bytes: any text can be encoded.
Kept tokens are numbered in CLIP's own order, so padding stays 0 and end-of-text stays the highest id.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from paris_p2p.components import clip_folder
from paris_p2p.errors import ConfigError

CONFIG_NAME = "tokenizer_config.json"
BYTE_TOKENS = 512  # 256 bytes, each inside a word or at its end
CLIP_VOCABULARY = 49408
START_TOKEN = CLIP_VOCABULARY - 2
END_TOKEN = CLIP_VOCABULARY - 1
MAX_CONTEXT_LENGTH = 4096
MAX_TEXT_CHARACTERS = 4000  # merging is quadratic in a word's length
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class _BytePairs:
    """open_clip's tokenizer, and for each merged token (id - 512) the ids of the two it is made of."""

    tokenizer: Any
    parts: list[tuple[int, int]]


@lru_cache(maxsize=1)
def _byte_pairs() -> _BytePairs:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    ids = tokenizer.encoder
    return _BytePairs(tokenizer, [(ids[left], ids[right]) for left, right in tokenizer.bpe_ranks])


class Tokenizer:
    """Text to token ids. `kept`: the merged CLIP tokens of a reduced vocabulary, or `None` for all of them.
    `pad_with_end`: short texts are filled up with the end token, as OpenAI's CLIP in the transformers library
    does, not with zeros, as open_clip does; experts see the difference.

    Raises `ConfigError` when `context_length` or `kept` is out of range.
    """

    def __init__(
        self, context_length: int = 77, kept: Iterable[int] | None = None, pad_with_end: bool = False
    ) -> None:
        if not 2 <= context_length <= MAX_CONTEXT_LENGTH:
            raise ConfigError(
                f"a tokenizer's context_length {context_length} is not in 2 to {MAX_CONTEXT_LENGTH}"
            )
        self.context_length = context_length
        self.pad_with_end = pad_with_end
        self.kept = None if kept is None else tuple(sorted(set(kept)))
        if self.kept and not BYTE_TOKENS <= self.kept[0] <= self.kept[-1] < START_TOKEN:
            raise ConfigError("a tokenizer's kept tokens must be merged tokens of CLIP's vocabulary")

    @classmethod
    def reduced(cls, texts: Iterable[str], context_length: int) -> Self:
        """The tokenizer whose vocabulary holds the tokens of `texts` and the fallback bytes."""
        encode = _byte_pairs().tokenizer.encode
        used = {token for text in texts for token in encode(text[:MAX_TEXT_CHARACTERS])}
        return cls(context_length, (token for token in used if BYTE_TOKENS <= token < START_TOKEN))

    @property
    def vocab_size(self) -> int:
        """How many ids there are: the size of the text encoder's embedding table."""
        return CLIP_VOCABULARY if self.kept is None else BYTE_TOKENS + len(self.kept) + 2

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The ids of `texts`, (N, context_length) int64: start, tokens, end, then zeros or more ends; texts
        that are too long are cut, the end token kept."""
        fill = self.vocab_size - 1 if self.pad_with_end else 0
        ids = torch.full((len(texts), self.context_length), fill, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = self._numbered([START_TOKEN, *self.tokens(text)])[: self.context_length - 1]
            tokens.append(self.vocab_size - 1)
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text`, as CLIP numbers them, spelled by kept ones, without start and end."""
        tokens = _byte_pairs().tokenizer.encode(text[:MAX_TEXT_CHARACTERS])
        return [part for token in tokens for part in self._spell(token)]

    def _spell(self, token: int) -> list[int]:
        if self.kept is None or token in self._numbers:
            return [token]
        left, right = _byte_pairs().parts[token - BYTE_TOKENS]
        return [*self._spell(left), *self._spell(right)]

    def _numbered(self, tokens: list[int]) -> list[int]:
        return tokens if self.kept is None else [self._numbers[token] for token in tokens]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """CLIP's id -> this vocabulary's id."""
        tokens = (*range(BYTE_TOKENS), *(self.kept or ()), START_TOKEN, END_TOKEN)
        return {token: number for number, token in enumerate(tokens)}

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write `tokenizer_config.json` into `folder`, making it."""
        config = {
            "tokenizer_class": type(self).__name__,
            "merges": "open_clip bpe_simple_vocab_16e6",
            "context_length": self.context_length,
            "kept_tokens": None if self.kept is None else list(self.kept),
        }
        if self.pad_with_end:  # left out otherwise: a file is named by its hash, and older ones lack it
            config["pad_with_end"] = True
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> Self:
        """The tokenizer in `folder`. Raises `ConfigError` when its file is missing or malformed."""
        path = Path(folder) / CONFIG_NAME
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from None
        return cls(**_checked(config, path))


def _checked(config: object, path: Path) -> dict[str, Any]:
    """The arguments in a tokenizer file, ours or transformers', which came from the network."""
    if isinstance(config, dict):
        foreign = clip_folder.tokenizer_arguments(path.parent, config)
        if foreign is not None:
            return foreign
        length, kept = config.get("context_length"), config.get("kept_tokens")
        whole = isinstance(kept, list) and all(type(token) is int for token in kept)
        if type(length) is int and (kept is None or whole):
            return {
                "context_length": length,
                "kept": kept,
                "pad_with_end": config.get("pad_with_end") is True,
            }
    raise ConfigError(f"{path} is malformed: it needs context_length and kept_tokens (a list, or null)")
