"""Training data: questions as padded micro-batches of nearly equal lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

import chat
import questions


@dataclass(frozen=True)
class Mix:
    """How often each kind is asked, in the order of `questions.KINDS`, and how often with thinking off."""

    kind_weights: tuple[float, ...]
    off_share: float

    def system(self, rng: random.Random) -> str | None:
        """The system message of one question. Few have none, and are to be answered with thinking."""
        shares = (1 - self.off_share - BARE_SHARE, self.off_share, BARE_SHARE)
        return rng.choices((chat.ON, chat.OFF, None), shares)[0]


BARE_SHARE = 0.04


# First the digits: columns and products.
DIGITS = Mix((1.0, 1.0, 2.0, 0.6, 1.6, 1.2), off_share=0.15)
# Then more of what is learned last. Most answers at once cannot be learned at this size, and what
# little there is to learn from them is noise to the rest.
LISTS = Mix((0.5, 0.5, 1.0, 0.9, 2.4, 2.6), off_share=0.04)

IGNORED = -100  # a target that has no loss: prompt and padding

POOL = 4_096  # examples that are sorted by length together


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded to one length; ids and targets: [rows, tokens]."""

    ids: Tensor
    targets: Tensor

    @property
    def learned_tokens(self) -> int:
        return int((self.targets != IGNORED).sum())


def collate(examples: list[chat.Example], pad: int) -> MicroBatch:
    """Pads on the right, where causal attention sees nothing of it."""
    tokens = max(map(len, examples)) - 1
    ids = torch.full((len(examples), tokens), pad)
    targets = torch.full((len(examples), tokens), IGNORED)
    for row, example in enumerate(examples):
        sequence = torch.tensor(example.prompt + example.completion)
        start, end = len(example.prompt) - 1, len(sequence) - 1
        ids[row, :end] = sequence[:-1]
        targets[row, start:end] = sequence[start + 1 :]
    return MicroBatch(ids, targets)


class Stream:
    """Endless micro-batches of the training side of the split."""

    def __init__(self, tokenizer: Tokenizer, seed: int, micro_batch_tokens: int):
        self.tokenizer, self.rng, self.mix = tokenizer, random.Random(seed), DIGITS
        self.pad, self.micro_batch_tokens = tokenizer.token_to_id(chat.PAD), micro_batch_tokens
        self.ready: list[MicroBatch] = []

    def change(self, mix: Mix) -> None:
        """Asks by another mix from the next micro-batch on."""
        self.mix, self.ready = mix, []

    def take(self, count: int) -> list[MicroBatch]:
        while len(self.ready) < count:
            self.ready += self._pool()
        taken, self.ready = self.ready[:count], self.ready[count:]
        return taken

    def _pool(self) -> list[MicroBatch]:
        asked = []
        for kind in self.rng.choices(questions.KINDS, self.mix.kind_weights, k=POOL):
            question = questions.sample(kind, self.rng, held_out=False)
            asked.append((question, self.mix.system(self.rng)))
        batches = by_length(chat.encode(self.tokenizer, asked), self.micro_batch_tokens, self.pad)
        self.rng.shuffle(batches)
        return batches


def by_length(examples: list[chat.Example], tokens: int, pad: int) -> list[MicroBatch]:
    """Cuts examples, sorted by length, into micro-batches of at most so many tokens with padding."""
    batches, rows = [], []
    for example in sorted(examples, key=len):
        if rows and (len(rows) + 1) * len(example) > tokens:
            batches.append(collate(rows, pad))
            rows = []
        rows.append(example)
    return [*batches, collate(rows, pad)]
