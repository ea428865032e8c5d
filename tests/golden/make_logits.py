"""Writes ``smollm2_logits.npz`` and ``smollm2_greedy.json``: what Transformers computes with the very weights
of the GGUF file.

    pip install torch transformers gguf && python -m tests.golden.make_logits MODEL.gguf

The ``gguf`` package dequantises every tensor to float32; q and k are un-permuted; a LlamaForCausalLM made
from the file's hyperparameters runs ``text.txt`` in chunks of 512 tokens, and continues three prompts
greedily.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CHUNK, TOP, POSITIONS = 512, 32, 1536
PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
)
CONTINUATION = 64

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Source:
    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path)

    def get(self, key: str) -> object:
        return self.reader.fields[key].contents()

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=len(self.get("tokenizer.ggml.tokens")),
            hidden_size=self.get("llama.embedding_length"),
            intermediate_size=self.get("llama.feed_forward_length"),
            num_hidden_layers=self.get("llama.block_count"),
            num_attention_heads=self.get("llama.attention.head_count"),
            num_key_value_heads=self.get("llama.attention.head_count_kv"),
            max_position_embeddings=self.get("llama.context_length"),
            rms_norm_eps=self.get("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self.get("llama.rope.freq_base"),
            tie_word_embeddings=True,
        )
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        state = {}
        for tensor in self.reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            layer, role = "", tensor.name.removesuffix(".weight")
            if role.startswith("blk."):
                _, number, role = role.split(".")
                layer = f"model.layers.{number}."
            if role in heads:  # from pairs (2i, 2i + 1) back to halves (i, i + d / 2)
                rows, columns = values.shape
                values = values.reshape(heads[role], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
            state[f"{layer}{_NAMES[role]}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
        model = LlamaForCausalLM(config).to(torch.float32).eval()
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert missing == ["lm_head.weight"], missing  # tied
        assert not unexpected, unexpected
        model.tie_weights()
        return model

    def tokenizer(self) -> Tokenizer:
        tokens, merges = self.get("tokenizer.ggml.tokens"), self.get("tokenizer.ggml.merges")
        kinds = self.get("tokenizer.ggml.token_type")
        made = Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
        return made


def main(path: Path) -> None:
    source = Source(path)
    model, tokenizer = source.model(), source.tokenizer()
    tokens = tokenizer.encode((HERE / "text.txt").read_text()).ids[:POSITIONS]
    ids, values, sums = [], [], []
    with torch.no_grad():
        for i in range(0, len(tokens), CHUNK):
            logits = model(torch.tensor([tokens[i : i + CHUNK]])).logits[0]
            top = logits.topk(TOP)
            ids.append(top.indices.numpy())
            values.append(top.values.numpy())
            sums.append(torch.logsumexp(logits.double(), dim=-1).numpy())
    np.savez_compressed(
        HERE / "smollm2_logits.npz",
        chunk=CHUNK,
        tokens=np.array(tokens, np.uint16),
        ids=np.concatenate(ids).astype(np.uint16),
        values=np.concatenate(values).astype(np.float32),
        logsumexp=np.concatenate(sums).astype(np.float32),
    )
    print(f"{len(tokens)} positions")

    texts = []
    for prompt in PROMPTS:
        prompt_tokens = tokenizer.encode(prompt).ids
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt_tokens]),
                max_new_tokens=CONTINUATION,
                min_new_tokens=CONTINUATION,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        continuation = out[0, len(prompt_tokens) :].tolist()
        print(repr(prompt), repr(tokenizer.decode(continuation, skip_special_tokens=False)))
        texts.append({"prompt": prompt, "prompt_tokens": prompt_tokens, "tokens": continuation})
    (HERE / "smollm2_greedy.json").write_text(json.dumps(texts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
