"""What one_group.py and which_block.py are given: the model, and text to calibrate and to measure on."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.models import load_model, load_tokenizer
from graftlm.pruning.calibration import TextCalibration, calibration_from
from graftlm.pruning.settings import PruneSettings
from graftlm.training.config import SourceConfig

CONTEXT = 1024


@dataclass(frozen=True)
class Given:
    model: PreTrainedModel
    batches: list[dict[str, Tensor]]
    """The first contexts of the text that losses are measured on: [1, CONTEXT] each."""
    out: Path
    _tokenizer: object
    _text: str

    def calibration(self, settings: PruneSettings) -> TextCalibration:
        return calibration_from(self._tokenizer, settings, [SourceConfig(self._text)], progress=False)


def read_arguments(doc: str | None, contexts: int) -> Given:
    """From the command line: calibration text, text to measure on, of which so many contexts, and the file to write."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    tokenizer = load_tokenizer("smollm2")
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8")[: 8 * CONTEXT * contexts])["input_ids"])
    batches = [{"input_ids": one[None], "labels": one[None]} for one in ids[: CONTEXT * contexts].view(-1, CONTEXT)]
    return Given(load_model("smollm2"), batches, options.out, tokenizer, options.calibration)
