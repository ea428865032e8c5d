"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with mixtures of small experts and a shared one. The weights of the chosen
experts do not sum to 1 unless the file says so.
"""

from __future__ import annotations

from pi2rt.formats.model_file import ModelFile, printable
from pi2rt.models import decoder, experts
from pi2rt.models.checkpoint import MAX_LAYERS, Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.rope import read_rope

QWEN_EXPERT_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_NAMES = QWEN_EXPERT_NAMES | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_DEFAULTS = {
    "intermediate_size": 5632,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
}


def describe_qwen2_moe(file: ModelFile, context: int | None) -> ModelDescription:
    """Yang et al., 2024."""
    c = Checkpoint(file, defaults=_DEFAULTS, huggingface_names=_NAMES, context=context)
    refuse_window(c)
    rope = read_rope(c, "halves")
    activation = decoder.activation_name(c)
    count = experts.expert_count(c, default=60)
    hidden = expert_hidden(c)
    shared_hidden = c.integer(
        "expert_shared_feed_forward_length", "shared_expert_intermediate_size", default=c.hidden
    )
    normalized = experts.normalizes(c, "norm_topk_prob", default=False)
    bias = c.value(None, "qkv_bias") is not False
    return decoder.model(
        c,
        (
            Layer(
                (
                    decoder.attention(c, i, rope, bias=bias),
                    experts.mixture(
                        c,
                        i,
                        activation,
                        count=count,
                        hidden=hidden,
                        normalized=normalized,
                        shared=experts.shared_expert(c, i, shared_hidden),
                    )
                    if mixed
                    else decoder.feed_forward(c, i, activation, gated=True),
                )
            )
            for i, mixed in enumerate(mixed_layers(c))
        ),
    )


def mixed_layers(c: Checkpoint) -> tuple[bool, ...]:
    """Which layers have experts; the others have a plain block. In GGUF files all have."""
    step = c.integer(None, "decoder_sparse_step", default=1, high=MAX_LAYERS)
    plain = c.value(None, "mlp_only_layers")
    if plain is None:
        plain = []
    if not isinstance(plain, list) or not all(isinstance(layer, int) for layer in plain):
        problem = f"{printable(repr(plain))} is not a list of numbers of layers"
        raise c.error(None, "mlp_only_layers", problem)
    return tuple(i not in plain and (i + 1) % step == 0 for i in range(c.n_layers))


def expert_hidden(c: Checkpoint) -> int:
    """Neurons of each expert; where a GGUF file does not say, those that a token uses are as many as a plain block
    has."""
    return c.integer(
        "expert_feed_forward_length", "moe_intermediate_size", default=max(1, c.hidden // experts.n_used(c))
    )


def refuse_window(c: Checkpoint) -> None:
    """No published model of these families has one, and which layers it is for differs between versions of
    Transformers."""
    if c.value(None, "use_sliding_window") is True:
        raise c.unsupported(None, "use_sliding_window", f"a sliding window in {c.architecture}")
