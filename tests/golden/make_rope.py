#!/usr/bin/env python3
"""Write linear_rope.json and llama3_rope.json: what transformers says about two tiny Llamas.

Arithmetic is float64, but for the angles of rope, which transformers takes in float32: that is the 3e-6
between it and the numpy reference.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers numpy
    /tmp/golden/bin/python tests/golden/make_rope.py

decilm_reference.py knows no linear rope, and its llama3 rope deserves a second opinion. The models are
the fixtures of the same names, made here again, so nothing binary is kept; model_sha256 tells whether
a fixture still has the weights of this file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "fixtures"))
from make_fixtures import log_softmax, make_model, prompt_ids  # noqa: E402

FIXTURES = {"linear_rope": "linear-rope", "llama3_rope": "llama"}


def logprobs_of(model, ids: list) -> list:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    rows = log_softmax(logits)
    return [None] + [round(float(row[token]), 7) for row, token in zip(rows, ids[1:])]


def golden_of(fixture: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / fixture
        reference = make_model(fixture, folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
        rope = json.loads((folder / "config.json").read_text())["rope_scaling"]
        sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        prompts = []
        for ids in prompt_ids(reference.cfg.vocab):
            prompts.append({"ids": ids, "token_logprobs": logprobs_of(model, ids)})
            ours = log_softmax(reference.logits(ids))
            distance = max(abs(ours[i, t] - prompts[-1]["token_logprobs"][i + 1]) for i, t in enumerate(ids[1:]))
            print(f"{fixture}: {len(ids)} tokens, at most {distance:.1e} from the numpy reference")
    return {
        "made_by": "tests/golden/make_rope.py",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__,
        },
        "fixture": fixture,
        "model_sha256": sha256,
        "rope_scaling": rope,
        "dtype": "float64",
        "prompts": prompts,
    }  # fmt: skip


def main() -> int:
    for name, fixture in FIXTURES.items():
        golden = golden_of(fixture)
        rows = ",\n".join("  " + json.dumps(prompt) for prompt in golden.pop("prompts"))
        head = json.dumps(golden, indent=1)[:-2]
        (HERE / f"{name}.json").write_text(f'{head},\n "prompts": [\n{rows}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
