"""A trained model as a Hugging Face directory, and back.

What was trained as a run of FFNs over one normed input is written as the one FFN that it equals: gate
and up rows stacked, down columns side by side. The other slots of the run stay in `block_configs` as
empty ones, so that every tensor keeps the slot that it was trained in.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import chat
from model import Config, DeciLm, Slot

NO_WINDOW = {
    "num_sink_tokens": None,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}


def write_directory(model: DeciLm, tokenizer: Tokenizer, out: Path) -> None:
    """Writes all files of the model; the weights in bf16."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.token_to_id(token) for token in chat.SPECIAL_TOKENS}
    eos = [ids[chat.EOS], ids[chat.EOM], ids[chat.EOT]]
    _write_json(out / "config.json", config_json(model.config, ids[chat.BOS], eos))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    _write_json(out / "generation_config.json", {"bos_token_id": ids[chat.BOS], "eos_token_id": eos, **sampling})
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(model.config, ids))
    _write_json(out / "special_tokens_map.json", _special_tokens())
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in checkpoint(model).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def checkpoint(model: DeciLm) -> dict[str, Tensor]:
    """The fused model's weights under the names of Hugging Face checkpoints."""
    if not model.is_fused:
        raise ValueError("the run of FFN-only blocks is not fused yet")
    start, end = model.config.run
    weights = {}
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers" and start <= int(parts[1]) < end:
            continue
        weights[name if parts[0] == "lm_head" else f"model.{name}"] = weight
    run, prefix = model.layers[start:end], f"model.layers.{end - 1}"
    weights[f"{prefix}.post_attention_layernorm.weight"] = run[-1].post_attention_layernorm.weight.detach()
    for projection, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        pieces = [getattr(block.mlp, projection).weight.detach() for block in run]
        weights[f"{prefix}.mlp.{projection}.weight"] = torch.cat(pieces, dim)
    return weights


def config_json(config: Config, bos: int, eos: list[int]) -> dict:
    slots = config.fused_slots()
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_configs": [block_config(slot, config.hidden) for slot in slots],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": config.context,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": config.heads,
        "num_hidden_layers": len(slots),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": config.eps,
        "rope_scaling": config.rope_scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocabulary,
    }


def block_config(slot: Slot, hidden: int) -> dict:
    group = slot.attention if isinstance(slot.attention, int) else None
    mult = ffn_mult(slot.ffn, hidden) if isinstance(slot.ffn, int) else None
    attention = {"n_heads_in_group": group, **_kind(slot.attention), **NO_WINDOW}
    return {"attention": attention, "ffn": {"ffn_mult": mult, **_kind(slot.ffn), "sparsify": None}}


def _kind(half: int | str | None) -> dict:
    return {"no_op": half is None, "replace_with_linear": half == "linear"}


def ffn_mult(width: int, hidden: int) -> float:
    """The multiplier of which DeciLM's rule makes this width."""
    mult = 3 * width / (2 * hidden)
    if ffn_width(mult, hidden) != width:
        raise ValueError(f"no ffn_mult makes a width of {width} at hidden size {hidden}")
    return mult


def ffn_width(mult: float, hidden: int) -> int:
    """DeciLM's rule: 2 * mult * hidden / 3, cut to a whole number, then up to a multiple of 256."""
    return -(-int(2 * mult * hidden / 3) // 256) * 256


def _tokenizer_config(config: Config, ids: dict[str, int]) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(id): {"content": token, **flags} for token, id in ids.items()},
        "chat_template": chat.TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens(),
    }


def _special_tokens() -> dict:
    return {"bos_token": chat.BOS, "eos_token": chat.EOT, "pad_token": chat.PAD}


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ reading


def read_directory(directory: Path) -> tuple[DeciLm, Tokenizer]:
    """The model as it was written, rounded to bf16 and computed in f32, and its tokenizer."""
    raw = json.loads((directory / "config.json").read_text())
    slots = tuple(_slot(block, raw["hidden_size"]) for block in raw["block_configs"])
    config = Config(
        vocabulary=raw["vocab_size"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        eps=raw["rms_norm_eps"],
        context=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"],
        rope_scaling=raw["rope_scaling"],
        slots=slots,
        run=(0, 0),  # fused already
    )
    model = DeciLm(config)
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))


def _slot(block: dict, hidden: int) -> Slot:
    def half(part: dict, whole: int | None) -> int | str | None:
        return None if part["no_op"] else "linear" if part["replace_with_linear"] else whole

    attention, ffn = block["attention"], block["ffn"]
    width = ffn_width(ffn["ffn_mult"], hidden) if ffn["ffn_mult"] else None
    return Slot(half(attention, attention["n_heads_in_group"]), half(ffn, width))
