"""Asks a written model its held-out questions, thinking on and off, and counts right answers.

    python evaluate.py --model ../ --questions ../../../configs/quickstart/questions.jsonl

As the Nemotron models are evaluated: thinking on at temperature 0.6 and top-p 0.95, thinking off
greedily. An answer counts when what the last `\\boxed{}` holds is the question's answer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import chat
from export import read_directory
from model import DeciLm

TEMPERATURE, TOP_P = 0.6, 0.95
MAX_TOKENS = 200
GROUP = 64  # questions that are answered together


@torch.inference_mode()
def generate(model: DeciLm, prompts: list[list[int]], ends: set[int], sample) -> list[list[int]]:
    """Continues prompts of one length until each has ended; `sample` makes token ids of logits."""
    pasts = [[] for _ in model.layers]
    tokens, position = torch.tensor(prompts), 0
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(MAX_TOKENS):
        logits = model.lm_head(model.trunk(tokens, pasts, position)[:, -1])
        position += tokens.shape[1]
        chosen = sample(logits)
        for row in list(open_rows):
            token = int(chosen[row])
            if token in ends:
                open_rows.discard(row)
            else:
                written[row].append(token)
        if not open_rows:
            break
        tokens = chosen.unsqueeze(1)
    return written


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def nucleus(generator: torch.Generator):
    """Sampling at the temperature and top-p of the model card."""

    def sample(logits: Tensor) -> Tensor:
        shares, order = (logits / TEMPERATURE).softmax(-1).sort(descending=True)
        shares[shares.cumsum(-1) - shares >= TOP_P] = 0
        return order.gather(1, torch.multinomial(shares, 1, generator=generator)).squeeze(1)

    return sample


def answers(model: DeciLm, tokenizer: Tokenizer, questions: list[str], thinking: bool, seed: int) -> list[str]:
    """What the model writes to each question."""
    system = chat.ON if thinking else chat.OFF
    prompts = [encoding.ids for encoding in tokenizer.encode_batch([chat.prompt_text(q, system) for q in questions])]
    ends = {tokenizer.token_to_id(token) for token in (chat.EOS, chat.EOM, chat.EOT)}
    sample = nucleus(torch.Generator().manual_seed(seed)) if thinking else greedy
    by_length = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    texts = [""] * len(prompts)
    for indices in by_length.values():
        for start in range(0, len(indices), GROUP):
            group = indices[start : start + GROUP]
            for index, ids in zip(group, generate(model, [prompts[i] for i in group], ends, sample)):
                texts[index] = tokenizer.decode(ids)
    return texts


def boxed(text: str) -> str | None:
    """What the last `\\boxed{}` holds."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1] if found else None


def evaluate(directory: Path, rows: list[dict], seed: int, log) -> None:
    """Logs the share of right answers of every kind, thinking on and off, and some that are wrong."""
    model, tokenizer = read_directory(directory)
    scores = {}
    for thinking in (True, False):
        texts = answers(model, tokenizer, [row["prompt"] for row in rows], thinking, seed)
        right = [boxed(text) == row["answer"] for text, row in zip(texts, rows)]
        scores[thinking] = _by_kind(rows, right)
        wrong = [(row, text) for row, text, is_right in zip(rows, texts, right) if not is_right]
        if thinking:
            for row, text in wrong[:10]:
                log(f"wrong: {row['prompt']} {row['answer']}, found {text!r}")
    log(f"{'kind':16}    n     on    off")
    for kind, (count, on) in scores[True].items():
        log(f"{kind:16} {count:4} {on:6.1%} {scores[False][kind][1]:6.1%}")


def _by_kind(rows: list[dict], right: list[bool]) -> dict[str, tuple[int, float]]:
    """Number of questions and share of right answers, by kind and of all."""
    by_kind = defaultdict(list)
    for row, is_right in zip(rows, right):
        by_kind[row["kind"]].append(is_right)
    by_kind["all"] = right
    return {kind: (len(marks), sum(marks) / len(marks)) for kind, marks in by_kind.items()}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    evaluate(args.model, read_rows(args.questions), args.seed, print)


if __name__ == "__main__":
    main()
