#!/usr/bin/env python3
"""Makes a Llama of 1.1 B random parameters in bf16, as a checkpoint and as llama.cpp's file, for compare.py.

    FOLDER/build-tools/bin/python benches/peers/random_llama.py --peers FOLDER --tokenizer models/smollm2-135m
    python benches/peers/compare.py --peers FOLDER/random-llama --model FOLDER/random-llama/checkpoint \
        --rows rows.jsonl --engines llama.cpp

FOLDER is where fetch.py has put llama.cpp. The blocks are those of benches/bulk_job's `llama`; tokenizer and
vocabulary are SmolLM2's, in llama.cpp's file as the one that fetch.py has put there has them. Both files hold the same numbers.
"""

import argparse
import json
import pathlib
import shutil

import gguf
import numpy
import safetensors

HIDDEN, BLOCKS, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 16, 8192, 32, 8, 64
SEED, DEVIATION = 1, 0.02

# A block's matrices, [outputs, inputs]: the name in a checkpoint, llama.cpp's, the shape.
MATRICES = [
    ("self_attn.q_proj", "attn_q", (HEADS * HEAD_DIM, HIDDEN)),
    ("self_attn.k_proj", "attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
    ("self_attn.v_proj", "attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
    ("self_attn.o_proj", "attn_output", (HIDDEN, HEADS * HEAD_DIM)),
    ("mlp.gate_proj", "ffn_gate", (FFN, HIDDEN)),
    ("mlp.up_proj", "ffn_up", (FFN, HIDDEN)),
    ("mlp.down_proj", "ffn_down", (HIDDEN, FFN)),
]
NORMS = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]


def tensors(vocabulary):
    """Each tensor: its name in a checkpoint, llama.cpp's, its numbers as the upper halves of f32."""
    random = numpy.random.default_rng(SEED)

    def matrix(shape):
        values = random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(DEVIATION)
        return (values.view(numpy.uint32) >> 16).astype(numpy.uint16)

    ones = numpy.full(HIDDEN, 0x3F80, numpy.uint16)
    yield "model.embed_tokens", "token_embd", matrix((vocabulary, HIDDEN))
    yield "model.norm", "output_norm", ones
    for block in range(BLOCKS):
        for name, other, shape in MATRICES:
            yield f"model.layers.{block}.{name}", f"blk.{block}.{other}", matrix(shape)
        for name, other in NORMS:
            yield f"model.layers.{block}.{name}", f"blk.{block}.{other}", ones


def turned(name, bits):
    """q and k as llama.cpp rotates them: numbers of a pair are neighbours, and not half a head apart."""
    if not name.endswith(("attn_q", "attn_k")):
        return bits
    return bits.reshape(-1, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(bits.shape)


def write_checkpoint(folder, tokenizer, values):
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {
        "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    entries = {
        f"{name}.weight": safetensors.TensorSpec(
            dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, _, bits in values
    }
    safetensors.serialize_file(entries, folder / "model.safetensors", {"format": "pt"})
    return config


def write_gguf(file, of_tokenizer, config, values):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, field in gguf.GGUFReader(of_tokenizer).fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for _, name, bits in values:
        name += ".weight"
        if bits.ndim == 1:
            writer.add_tensor(name, (bits.astype(numpy.uint32) << 16).view(numpy.float32))
        else:
            bits = turned(name.removesuffix(".weight"), bits)
            writer.add_tensor(name, bits.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=pathlib.Path, required=True, help="where fetch.py has put llama.cpp")
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="a checkpoint whose tokenizer it has")
    args = parser.parse_args()
    peers = args.peers.resolve()
    into = peers / "random-llama"
    vocabulary = json.loads((args.tokenizer / "config.json").read_text())["vocab_size"]
    values = list(tensors(vocabulary))
    config = write_checkpoint(into / "checkpoint", args.tokenizer, values)
    write_gguf(into / "model.gguf", peers / "model.gguf", config, values)
    (into / "llama.cpp").unlink(missing_ok=True)
    (into / "llama.cpp").symlink_to(peers / "llama.cpp")


if __name__ == "__main__":
    main()
