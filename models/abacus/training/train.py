"""Makes Abacus from its seeds: tokenizer, training, fusion, export, evaluation.

    python train.py --out OUT        # the model's directory, with train.log

The training begins with the run of FFN-only blocks in sequence; from `FUSE_AT` on the run is fused into
one wide FFN. At `DECAY_AT` the mix of questions changes and the learning rate starts to fall straight
to zero. Threads share the weights; each takes the next
micro-batch of a step when it is done with one, so that a busy core slows a step but does not stall it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

import chat
import data
import questions
from evaluate import evaluate
from export import write_directory
from make_questions import quickstart_rows
from model import Config, DeciLm

STEP_TOKENS = 8_192
MICRO_BATCH_TOKENS = 1_024
STEPS = 2_100
WARMUP_STEPS = 50
FUSE_AT, DECAY_AT = 881, 900
COSINE_STEPS = 2_400  # the cosine that the rate follows until DECAY_AT would end here
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
WEIGHT_DECAY = 0.01
CLIP = 1.0
PROBE_EVERY, PROBE_QUESTIONS = 50, 40


class Trainer:
    """A model, its optimizers, and a replica of it for each thread that shares its weights."""

    def __init__(self, config: Config, threads: int, seed: int, first_step: int = 1):
        torch.manual_seed(seed)
        self.first_step, self.model = first_step, DeciLm(config)
        self.replicas = [self.model, *(self._replica(config) for _ in range(threads - 1))]
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        matrices, others = [], []
        for name, weight in self.model.named_parameters():
            is_matrix = weight.dim() == 2 and "embed" not in name and "lm_head" not in name
            (matrices if is_matrix else others).append(weight)
        self.optimizers = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
        ]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._rate) for o in self.optimizers]

    def _replica(self, config: Config) -> DeciLm:
        replica = DeciLm(config)
        for own, shared in zip(replica.parameters(), self.model.parameters()):
            own.data = shared.data
        return replica

    def _rate(self, done: int) -> float:
        """The share of the full learning rate after so many updates of this run."""
        return min(1, (done + 1) / WARMUP_STEPS) * rate(self.first_step + done)

    def fuse(self) -> None:
        for replica in self.replicas:
            replica.fuse()

    def step(self, batches: list[data.MicroBatch]) -> float:
        """One update; returns the mean loss of the learned tokens."""
        learned = sum(batch.learned_tokens for batch in batches)
        queue: SimpleQueue = SimpleQueue()
        for batch in batches:
            queue.put(batch)
        losses = list(self.pool.map(lambda replica: self._work(replica, queue, learned), self.replicas))
        self._gather_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer, schedule in zip(self.optimizers, self.schedules):
            optimizer.step()
            schedule.step()
        for replica in self.replicas:
            replica.zero_grad(set_to_none=True)
        return sum(losses)

    @staticmethod
    def _work(replica: DeciLm, queue: SimpleQueue, learned: int) -> float:
        """Takes micro-batches until there are none; their share of the step's loss."""
        total = 0.0
        while True:
            try:
                batch = queue.get_nowait()
            except Empty:
                return total
            loss = summed_loss(replica, batch) / learned
            loss.backward()
            total += loss.item()

    def _gather_gradients(self) -> None:
        for shared, *others in zip(*(replica.parameters() for replica in self.replicas)):
            gradients = [weight.grad for weight in (shared, *others) if weight.grad is not None]
            shared.grad = sum(gradients) if gradients else None


def rate(step: int) -> float:
    """The share of the full learning rate at a step: along a cosine, then straight to zero."""

    def cosine(step: int) -> float:
        return (1 + math.cos(math.pi * step / COSINE_STEPS)) / 2

    if step < DECAY_AT:
        return cosine(step)
    return cosine(DECAY_AT) * max(0, STEPS + 1 - step) / (STEPS + 1 - DECAY_AT)


def summed_loss(model: DeciLm, batch: data.MicroBatch) -> torch.Tensor:
    """Cross entropy of the completions, in bf16 as the model will run."""
    is_learned = batch.targets != data.IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(model.trunk(batch.ids)[is_learned])
    return F.cross_entropy(logits.float(), batch.targets[is_learned], reduction="sum")


class Probe:
    """Held-out questions, read with their right answers: a row counts when every token of its
    completion is the likeliest, and then greedy decoding would write just that."""

    def __init__(self, tokenizer, seed: int):
        rng = random.Random(seed)
        self.batches = {}
        for thinking in (True, False):
            for kind in questions.KINDS:
                asked = [questions.sample(kind, rng, held_out=True, full_size=True) for _ in range(PROBE_QUESTIONS)]
                examples = chat.encode(tokenizer, [(question, chat.ON if thinking else chat.OFF) for question in asked])
                self.batches[kind, thinking] = data.collate(examples, tokenizer.token_to_id(chat.PAD))

    @torch.no_grad()
    def scores(self, model: DeciLm) -> str:
        parts = []
        for thinking in (True, False):
            shares = [f"{kind[:3]} {self._share(model, self.batches[kind, thinking]):.2f}" for kind in questions.KINDS]
            parts.append(f"{'on' if thinking else 'off'}: {' '.join(shares)}")
        return " | ".join(parts)

    @staticmethod
    def _share(model: DeciLm, batch: data.MicroBatch) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            likeliest = model(batch.ids).argmax(-1)
        right = (likeliest == batch.targets) | (batch.targets == data.IGNORED)
        return right.all(dim=1).float().mean().item()


def train(tokenizer, args: argparse.Namespace, log) -> DeciLm:
    first_step = args.resume_at or 1
    trainer = Trainer(Config(), args.threads, args.seed, first_step)
    stream = data.Stream(tokenizer, args.seed + first_step - 1, MICRO_BATCH_TOKENS)
    if args.resume_at:
        trainer.model.load_state_dict(torch.load(args.out / "checkpoint.pt"))
    probe = Probe(tokenizer, args.seed)
    num_parameters = sum(weight.numel() for weight in trainer.model.parameters())
    log(f"{num_parameters:,} parameters, steps {first_step} to {STEPS:,} of {STEP_TOKENS:,} tokens, seed {args.seed}")
    started, losses = time.time(), []
    for step in range(first_step, STEPS + 1):
        if step >= FUSE_AT and not trainer.model.is_fused:
            log(f"before fusion: {probe.scores(trainer.model)}")
            trainer.fuse()
            log(f"fused:         {probe.scores(trainer.model)}")
        if step == max(DECAY_AT, first_step):
            stream.change(data.LISTS)
        losses.append(trainer.step(stream.take(STEP_TOKENS // MICRO_BATCH_TOKENS)))
        if step % PROBE_EVERY == 0 or step == STEPS:
            speed = (step + 1 - first_step) * STEP_TOKENS / (time.time() - started)
            mean = sum(losses) / len(losses)
            log(f"step {step:5} loss {mean:.4f} {speed:6,.0f} tokens/s {probe.scores(trainer.model)}")
            losses.clear()
            torch.save(trainer.model.state_dict(), args.out / "checkpoint.pt")
    log(f"trained in {(time.time() - started) / 60:.1f} minutes")
    return trainer.model


def logger(path: Path):
    """Prints lines with the time since the start, and keeps them in a file."""
    started, file = time.time(), path.open("a")

    def log(line: str) -> None:
        for out in (sys.stdout, file):
            print(f"{time.time() - started:7.1f} s  {line}", file=out, flush=True)

    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the log")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json to use instead of training one")
    parser.add_argument("--resume-at", type=int, metavar="STEP", help="go on from OUT/checkpoint.pt with new optimizers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    log = logger(args.out / "train.log")
    tokenizer = Tokenizer.from_file(args.tokenizer) if args.tokenizer else chat.train_tokenizer(args.seed)
    model = train(tokenizer, args, log)
    write_directory(model, tokenizer, args.out)
    evaluate(args.out, quickstart_rows(), args.seed, log)


if __name__ == "__main__":
    main()
