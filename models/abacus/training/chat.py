"""Conversations as text and as token ids: the chat template and the tokenizer.

The template is that of the Nemotron models: the system block is always there, and its text,
`detailed thinking on` or `detailed thinking off`, is the switch. The tokenizer is a byte-level BPE
with Llama 3's special tokens and splitting rule, but for digits, which always stand alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import jinja2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import questions

VOCABULARY = 512

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)

BOS, EOS, PAD, EOM, EOT = (SPECIAL_TOKENS[i] for i in (0, 1, 2, 5, 6))

# Llama 3's rule, with \p{N} in place of \p{N}{1,3}.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = \"\" %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}'
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' and '</think>' in message['content'] %}"
    "{%- set content = message['content'].split('</think>')[-1].lstrip() %}"
    "{%- else %}{%- set content = message['content'] %}{%- endif %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

_template = jinja2.Environment().from_string(TEMPLATE)


ON, OFF = "detailed thinking on", "detailed thinking off"


def prompt_text(question: str, system: str | None) -> str:
    """The whole prompt, up to where the assistant begins; without a system message its block is empty."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return _template.render(messages=messages, bos_token=BOS, add_generation_prompt=True)


def train_tokenizer(seed: int, samples: int = 12_000) -> Tokenizer:
    """A tokenizer whose merges come from the training questions, so that a common word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, samples), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() > VOCABULARY:
        raise ValueError(f"vocabulary of {tokenizer.get_vocab_size()} tokens, expected at most {VOCABULARY}")
    return tokenizer


def _corpus(seed: int, samples: int):
    rng = random.Random(seed)
    for _ in range(samples):
        question = questions.sample(rng.choice(questions.KINDS), rng, held_out=False)
        yield f"system\n\n{ON}"
        yield f"system\n\n{OFF}"
        yield f"user\n\n{question.prompt}"
        yield f"assistant\n\n{question.completion(thinking=True)}"


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn, as token ids."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode(tokenizer: Tokenizer, items: list[tuple[questions.Question, str | None]]) -> list[Example]:
    """Questions with their system messages as token ids; all but `OFF` are answered with thinking. Prompt
    and completion are encoded apart, as they are when the model is asked."""
    prompts = [prompt_text(question.prompt, system) for question, system in items]
    completions = [question.completion(thinking=system != OFF) + EOT for question, system in items]
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(completions))
    return [Example(prompt.ids, completion.ids) for prompt, completion in encoded]
