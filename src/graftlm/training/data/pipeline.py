"""One source from its rows to its blocks: read, convert, hold back, tokenise, pack. Caching and streaming share it."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data.chat import ChatEncoder
from graftlm.training.data.encode import Encoded, encode_conversations, encode_texts
from graftlm.training.data.formats import CONVERSATIONS, columns_of, detect_format, iterate_documents
from graftlm.training.data.packing import Block, ConversationPacker, TextPacker
from graftlm.training.data.sources import iterate_rows, source_identity
from graftlm.training.data.statistics import Counts, not_read

HeldOut = Callable[[int], bool]
"""Whether the document of this number is held back for evaluation."""


def hold_out_score(index: int) -> float:
    """A number in [0, 1) that depends only on a document's number, so runs of any seed evaluate the same ones."""
    digest = hashlib.blake2b(str(index).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@dataclass(frozen=True)
class HoldOutRule:
    """Holds back about `fraction` of the documents, never the first one, so that something is left to train on."""

    fraction: float = 0.0

    def __call__(self, index: int) -> bool:
        return index > 0 and self.fraction > 0 and hold_out_score(index) < self.fraction


@dataclass
class SourcePipeline:
    """A source with all that its blocks depend on; reads the first row when made, to learn its format."""

    source: SourceConfig
    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    format: str = field(init=False)

    def __post_init__(self) -> None:
        counts = Counts()
        row = next(iterate_rows(self.source, counts), None)
        if row is None:
            which = f" of {self.source.half} number" if self.source.half else ""
            skipped = f" ({not_read(counts)})" if not_read(counts) else ""
            raise UserError(
                f"data: {self.source.path}: no document in it{which}{skipped}; name another file, folder or pattern"
            )
        self.format = detect_format(row, self.source, prefer_text=self.config.task == "cpt")

    @property
    def task(self) -> Literal["cpt", "sft"]:
        """cpt for text, sft for conversations."""
        return "cpt" if self.format == "text" else "sft"

    def settings(self) -> dict[str, Any]:
        """Everything besides the tokenizer that decides the blocks, as JSON."""
        names = ["max_length", "packing"]
        names += ["document_boundaries"] if self.task == "cpt" else ["assistant_only_loss", "truncation"]
        return {
            "source": source_identity(self.source),
            "format": self.format,
            **({} if self.task == "cpt" else {"conversations": CONVERSATIONS}),
            **{name: getattr(self.config, name) for name in names},
        }

    def blocks(
        self, counts: Counts, held_out: HeldOut = HoldOutRule(), *, only: Literal["train", "held_out"] | None = None
    ) -> Iterator[tuple[bool, Block]]:
        """Yield (held out?, block), both kinds in the documents' order; `only` leaves the other kind untokenised.

        counts: raised as the source is read. A document is never in blocks of both kinds.
        """
        unused = Counts()  # truncation of held-out documents is no news about training
        packers = {False: self._packer(counts), True: self._packer(unused)}
        for encoded in self._encoded(counts, held_out, only):
            held = held_out(encoded.index)
            if encoded.first and held:
                counts.held_out_documents += 1
            elif encoded.first:
                counts.documents += 1
            for block in packers[held].add(encoded):
                yield held, block
        for held, packer in packers.items():
            for block in packer.finish():
                yield held, block

    def documents_with_blocks(self) -> list[int]:
        """The numbers of the documents that give a block by themselves: one that is empty or dropped does not."""
        found = []
        documents = self._encoded(Counts(), HoldOutRule(), None)
        for number, pieces in itertools.groupby(documents, key=lambda encoded: encoded.index):
            packer = self._packer(Counts())
            # All of its pieces are read, for the next document comes after them.
            blocks = sum(sum(1 for _ in packer.add(piece)) for piece in pieces) + sum(1 for _ in packer.finish())
            found += [number] if blocks else []
        return found

    def _packer(self, counts: Counts) -> TextPacker | ConversationPacker:
        config = self.config
        if self.task == "cpt":
            apart = config.packing and config.document_boundaries
            return TextPacker(config.max_length, boundaries=apart, separate=not config.packing)
        return ConversationPacker(
            config.max_length, packing=config.packing, truncation=config.truncation, counts=counts
        )

    def _encoded(self, counts: Counts, held_out: HeldOut, only: str | None) -> Iterator[Encoded]:
        rows = iterate_rows(self.source, counts, columns_of(self.format, self.source))
        documents: Iterator[Any] = iterate_documents(rows, self.source, self.format, counts)
        if only is not None:
            wanted = only == "held_out"
            documents = (document for document in documents if held_out(document.index) is wanted)
        if self.task == "cpt":
            return encode_texts(documents, self.tokenizer)
        encoder = ChatEncoder(self.tokenizer)
        return encode_conversations(documents, encoder, assistant_only=self.config.assistant_only_loss)
