#!/usr/bin/env python3
"""Write smollm2_greedy.json: what transformers, in float32, makes of 20 prompts, 32 greedy tokens each.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers numpy
    /tmp/golden/bin/python tests/golden/make_smollm2_greedy.py models/smollm2-135m

The tests compare tokens in float32 and, teacher-forced on these tokens, log-probabilities in
bfloat16. A prompt whose best and second-best token ever lie closer than MIN_MARGIN is refused here:
there another order of summation could rightly choose otherwise, and the test would be about luck.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NEW_TOKENS = 32
# Ten times the largest distance of these logits from the same model in float64, which is 9.7e-5.
MIN_MARGIN = 1e-3

CHATS = {
    "capital": [("user", "What is the capital of France?")],
    "arithmetic": [("user", "What is 17 + 25? Answer with the number only.")],
    "poem": [("user", "Write a short poem about the sea.")],
    "system": [("system", "You are a pirate. Answer in one sentence."), ("user", "Where did you sail today?")],
    "turns": [
        ("user", "My name is Ada."),
        ("assistant", "Nice to meet you, Ada! How can I help you today?"),
        ("user", "What is my name?"),
    ],
    "list": [("user", "List three primary colours, one per line.")],
    "code_request": [("user", "Write a Python function that reverses a string.")],
    "translate": [("user", "Translate 'good morning' to Spanish.")],
    "rewrite": [("user", "Make this sentence formal: hey, can u send me that file asap?")],
    "markdown": [("system", "Reply in **Markdown**.\n\nBe brief."), ("user", "How do I boil an egg?\n\n1. First\n2. Then")],
}
TEXTS = {
    "story": "Once upon a time, in a small village by the sea,",
    "fact": "The mitochondria is the powerhouse of the",
    "one_word": "The",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "digits": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "dialogue": "Alice: Did you finish the report?\nBob:",
    "unicode": "Le café près de la tour Eiffel était fermé, alors naïvement nous",
    "json": '{"name": "Alice", "age": 30, "city": "Paris"}\n{"name": "Bob", "age": 25, "city":',
    "repeat": "to be or not to be to be or not to be to be or not",
    "paragraph": "Photosynthesis is the process by which green plants, algae and some bacteria turn light into chemical "
    "energy. Chlorophyll in the leaves absorbs mostly red and blue light, which is why leaves look green. The energy is used "
    "to split water into oxygen, which leaves the plant, and hydrogen, which is joined with carbon dioxide from the air to "
    "make sugars. Almost all life on Earth depends on this process, because",
}


def prompts(tok) -> list:
    made = []
    for name, turns in CHATS.items():
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        made.append({"name": name, "kind": "chat", "messages": messages, "text": text})
    made += [{"name": name, "kind": "plain", "text": text} for name, text in TEXTS.items()]
    return made


def continue_greedily(model, ids: list) -> dict:
    """Whole greedy continuation; an end-of-sequence token is its last id, as generate returns it."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[0, len(ids) :].tolist()
    logprobs, margins = [], []
    for token, logits in zip(new, out.logits, strict=True):
        best, second = torch.topk(logits[0], 2).values.tolist()
        logprobs.append(torch.log_softmax(logits[0].double(), -1)[token].item())
        margins.append(best - second)
    ended = new[-1] == model.generation_config.eos_token_id
    return {
        "ids": new,
        "logprobs": [round(x, 6) for x in logprobs],
        "margins": [round(x, 6) for x in margins],
        "finish_reason": "stop" if ended else "length",
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="the folder that `cargo smollm2` makes")
    p.add_argument("--out", type=Path, default=Path(__file__).with_name("smollm2_greedy.json"))
    a = p.parse_args()
    torch.set_num_threads(2)
    tok = PreTrainedTokenizerFast.from_pretrained(a.model)
    plain = tokenizers.Tokenizer.from_file(str(a.model / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()

    made = prompts(tok)
    for prompt in made:
        prompt["prompt_ids"] = tok(prompt["text"], add_special_tokens=False)["input_ids"]
        if prompt["prompt_ids"] != plain.encode(prompt["text"]).ids:
            sys.exit(f"error: prompt {prompt['name']}: transformers does not use tokenizer.json as it is")
        prompt |= continue_greedily(model, prompt["prompt_ids"])
        prompt["completion"] = tok.decode(prompt["ids"], skip_special_tokens=True)
        print(f"{prompt['name']:>12} {min(prompt['margins']):9.5f} {prompt['finish_reason']:>6} {prompt['completion']!r}")
        if min(prompt["margins"]) < MIN_MARGIN:
            sys.exit(f"error: prompt {prompt['name']}: margin {min(prompt['margins'])} is below {MIN_MARGIN}; choose another")
    golden = {
        "made_by": "tests/golden/make_smollm2_greedy.py",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
        },
        "model": "smollm2-135m",
        "model_sha256": hashlib.sha256((a.model / "model.safetensors").read_bytes()).hexdigest(),
        "dtype": "float32",
        "max_new_tokens": NEW_TOKENS,
        "prompts": made,
    }  # fmt: skip
    rows = ",\n".join("  " + json.dumps(prompt, ensure_ascii=False) for prompt in golden.pop("prompts"))
    head = json.dumps(golden, indent=1)[:-2]
    a.out.write_text(f'{head},\n "prompts": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
