#!/usr/bin/env python3
"""Makes a Llama of 1.1 B random parameters in bf16, as a checkpoint and as llama.cpp's file, for compare.py.

    FOLDER/vllm/bin/python benches/peers/random_llama.py --peers FOLDER --tokenizer models/smollm2-135m
    python benches/peers/compare.py --peers FOLDER/random-llama --model FOLDER/random-llama/checkpoint \
        --rows rows.jsonl --engines llama.cpp

FOLDER is where fetch.py has put both of the others: torch comes from vLLM's environment, the converter from llama.cpp's
source. The blocks are those of benches/bulk_job's `llama`; tokenizer and vocabulary are of the model named.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import torch
from safetensors.torch import save_file

HIDDEN, BLOCKS, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 16, 8192, 32, 8, 64
SEED, DEVIATION = 1, 0.02


def weights(vocabulary):
    """Each tensor of the checkpoint, [outputs, inputs] for matrices."""
    torch.manual_seed(SEED)

    def matrix(outputs, inputs):
        return (torch.randn(outputs, inputs) * DEVIATION).to(torch.bfloat16)

    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    tensors = {"model.embed_tokens.weight": matrix(vocabulary, HIDDEN), "model.norm.weight": ones()}
    for block in range(BLOCKS):
        for name, shape in shapes.items():
            tensors[f"model.layers.{block}.{name}.weight"] = matrix(*shape)
        for name in ["input_layernorm", "post_attention_layernorm"]:
            tensors[f"model.layers.{block}.{name}.weight"] = ones()
    return tensors


def ones():
    return torch.ones(HIDDEN, dtype=torch.bfloat16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=pathlib.Path, required=True, help="where fetch.py has put the others")
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="a checkpoint whose tokenizer it has")
    args = parser.parse_args()
    into = args.peers.resolve() / "random-llama"
    checkpoint = into / "checkpoint"
    shutil.copytree(args.tokenizer, checkpoint, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text()) | {
        "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "tie_word_embeddings": True,
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(config))
    save_file(weights(config["vocab_size"]), checkpoint / "model.safetensors", metadata={"format": "pt"})
    source = next(args.peers.resolve().glob("llama_cpp_python-*/vendor/llama.cpp"))
    command = [sys.executable, source / "convert_hf_to_gguf.py", checkpoint, "--outtype", "bf16", "--outfile", into / "model.gguf"]
    subprocess.run(command, check=True, env=dict(os.environ, PYTHONPATH=str(source / "gguf-py")))
    (into / "llama.cpp").unlink(missing_ok=True)
    (into / "llama.cpp").symlink_to(args.peers.resolve() / "llama.cpp")


if __name__ == "__main__":
    main()
