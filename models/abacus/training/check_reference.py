"""Compares the logits of a written model with those of the numpy reference forward pass.

    python check_reference.py --model ../

Both compute in f32 from the same bf16 weights, so they agree to f32 rounding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import chat
from export import read_directory
from make_questions import quickstart_rows

REFERENCE = Path(__file__).resolve().parents[3] / "tests" / "reference"
TOLERANCE = 1e-3  # logits span some tens; f32 sums of 2,048 terms in another order move them by 1e-4
QUESTIONS = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(REFERENCE))
    from decilm_reference import Model

    model, tokenizer = read_directory(args.model)
    reference = Model(args.model, np.float32)
    worst = 0.0
    for row in quickstart_rows()[:QUESTIONS]:
        ids = tokenizer.encode(chat.prompt_text(row["prompt"], chat.ON)).ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[0].numpy()
        worst = max(worst, float(np.abs(logits - reference.logits(ids)).max()))
    print(f"largest difference of a logit: {worst:.1e}, unused tensors: {reference.w.unused()}")
    return 0 if worst <= TOLERANCE and not reference.w.unused() else 1


if __name__ == "__main__":
    sys.exit(main())
