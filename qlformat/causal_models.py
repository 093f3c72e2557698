"""Parameters of causal language models, counted from config.json alone: which linear layers, how wide, and the rest.

The families are those that people fine-tune; the counts are compared with transformers' own models in the interop
tests. Neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from qlformat.errors import QlfError, shown


@dataclass(frozen=True)
class Linear:
    """A linear layer [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class CausalModel:
    """The shape of a model.

    Attributes:
        model_type: of config.json.
        layers, hidden, vocab, context: depth, width of the residual stream, tokens known, tokens at once (or None).
        linears: of one layer; `outer`: outside the layers, without the output embedding.
        attention, kv: width of the queries, and of the keys; fused: one tensor holds q, k and v before q and k are
            rotated, and the values keep all of it alive.
        inner: width of the feed-forward part; gated: it has a second branch that is multiplied in.
        rms: norms are computed in float32 (RMSNorm); normed: values that a layer's norms take for a token.
        kept: copies of the inner width that the activation function keeps for its gradient.
        scores: attention scores kept for a pair of tokens: the heads where transformers has no fused attention, else 0.
        embedding, positions, head: elements of the token, learned position and output embeddings (0 where tied).
        others: elements of norms and biases, of all layers together.
    """

    model_type: str
    layers: int
    hidden: int
    vocab: int
    context: int | None
    linears: tuple[Linear, ...]
    attention: int
    kv: int
    inner: int
    gated: bool
    rms: bool
    normed: int
    kept: int
    scores: int
    fused: bool
    embedding: int
    positions: int
    head: int
    others: int
    outer: tuple[Linear, ...] = field(default=())

    @property
    def quantized(self) -> bool:
        """Whether the linear layers are quantized; bitsandbytes passes over Falcon's own class of them."""
        return self.model_type != "falcon"

    @property
    def linear(self) -> int:
        """Weights of all linear layers."""
        return self.layers * sum(layer.weights for layer in self.linears) + sum(layer.weights for layer in self.outer)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.positions + self.linear + self.others + self.head

    @property
    def all_linears(self) -> list[Linear]:
        """Every linear layer that a LoRA is put on: all but the output embedding (paper, section 4)."""
        return [*(self.linears * self.layers), *self.outer]


def describe(config: Mapping[str, Any]) -> CausalModel:
    """The shape of the model that a config.json describes.

    Raises:
        QlfError: the architecture is not one of FAMILIES, or a field is missing or of the wrong type.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        inside = config.get("text_config")
        if isinstance(inside, Mapping) and inside.get("model_type") in _FAMILIES:
            raise QlfError(
                f"model type {shown(kind)} has more than a language model in it; give the config.json of its language "
                f"model alone (text_config, type {shown(inside.get('model_type'))})"
            )
        raise QlfError(
            f"model type {shown(kind)} is not known to the estimate, needed one of {', '.join(FAMILIES)}; "
            "`qlf inspect` counts the parameters of any model from its weight files"
        )
    return _FAMILIES[kind](_Fields(config))


# transformers computes these in several operations, each of which keeps its input.
_IN_PYTHON = frozenset({"gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu"})
_ACTIVATION: Mapping[str, str] = MappingProxyType(dict.fromkeys(("gpt2", "gpt_neo", "gptj", "phi"), "gelu_new"))


_EAGER = frozenset({"bloom", "gemma2", "gpt_neo", "gptj", "mpt"})


class _Fields:
    """Fields of a config.json, by the names that the families give them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.kind = str(config["model_type"])

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive integer under the first name that is there and not null."""
        for name in names:
            value = self._config.get(name)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise QlfError(f"config.json: {name} is {shown(value)}, needed a positive integer")
                return value
        if default is None:
            raise QlfError(f"config.json: found no {names[0]}, which a model of type {self.kind!r} has")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._config.get(name)
        return default if value is None else bool(value)

    def context(self) -> int | None:
        """The longest sequence, where the config says."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        return next((value for name in names if isinstance(value := self._config.get(name), int)), None)

    def heads(self) -> tuple[int, int, int, int]:
        """(hidden size, heads, key-value heads, width of a head)."""
        hidden = self.size("hidden_size", "n_embd", "d_model")
        heads = self.size("num_attention_heads", "n_head", "n_heads", "num_heads")
        kv_heads, width = (
            self.size("num_key_value_heads", default=heads),
            self.size("head_dim", default=hidden // heads),
        )
        return hidden, heads, kv_heads, width

    def model(self, **parts: Any) -> CausalModel:
        """The model, with what every family has. `norms`: elements per layer; `final`: behind the layers."""
        layers = self.size("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        hidden, vocab = self.size("hidden_size", "n_embd", "d_model"), self.size("vocab_size")
        tied = self.flag("tie_word_embeddings", parts.pop("tied", False))
        width = parts.pop("embedding_width", hidden)
        head_bias = vocab if parts.pop("head_bias", False) else 0
        linears, outer = parts["linears"], parts.setdefault("outer", ())
        biases = layers * sum(x.outputs for x in linears if x.bias) + sum(x.outputs for x in outer if x.bias)
        others = layers * parts.pop("norms") + parts.pop("final") + biases + head_bias
        function = self._config.get("hidden_act") or self._config.get("activation_function")
        kept = 4 if (function or _ACTIVATION.get(self.kind)) in _IN_PYTHON else 1
        parts.setdefault("rms", False)
        parts.setdefault("gated", False)
        parts.setdefault("fused", False)
        return CausalModel(
            self.kind, layers, hidden, vocab, self.context(), kept=kept, others=others,
            scores=self.heads()[1] if self.kind in _EAGER else 0, embedding=vocab * width,
            positions=parts.pop("positions", 0) * hidden, head=0 if tied else vocab * width, **parts,
        )  # fmt: skip


def _llama_like(
    fields: _Fields, *, norms: int = 2, norm_bias: bool = False, qk_norm: str = "", qkv: bool = False,
    out: bool = False, mlp: bool = False, tied: bool = False, gated: bool = True, rms: bool = True, fused: bool = False,
) -> CausalModel:  # fmt: skip
    """Llama and its relatives. norms: of a layer; qk_norm: of each head or the whole; qkv, out, mlp: biases."""
    hidden, heads, kv_heads, width = fields.heads()
    inner, query, kv = fields.size("intermediate_size"), heads * width, kv_heads * width
    attention = [Linear(f"{name}_proj", hidden, size, qkv) for name, size in (("q", query), ("k", kv), ("v", kv))]
    first = [Linear(f"{name}_proj", hidden, inner, mlp) for name in (["gate"] * gated + ["up"])]
    if fused:
        attention = [Linear("qkv_proj", hidden, query + 2 * kv, qkv)]
        first = [Linear("gate_up_proj", hidden, 2 * inner, mlp)]
    linears = (*attention, Linear("o_proj", query, hidden, out), *first, Linear("down_proj", inner, hidden, mlp))
    size = hidden * (2 if norm_bias else 1)
    extra = {"": 0, "head": 2 * width, "whole": query + kv}[qk_norm]
    return fields.model(linears=linears, attention=query, kv=kv, inner=inner, gated=gated, rms=rms, tied=tied,
                        norms=norms * size + extra, final=size,
                        normed=norms * hidden + (query + kv if qk_norm else 0), fused=fused)  # fmt: skip


def _llama(fields: _Fields) -> CausalModel:
    bias = fields.flag("attention_bias")
    return _llama_like(fields, qkv=bias, out=bias, mlp=fields.flag("mlp_bias"), tied=fields.kind == "smollm3")


def _qwen3(fields: _Fields) -> CausalModel:
    bias = fields.flag("attention_bias")
    return _llama_like(fields, qkv=bias, out=bias, qk_norm="head")


def _gemma(fields: _Fields) -> CausalModel:
    bias = fields.flag("attention_bias")
    norms, qk_norm = (2 if fields.kind == "gemma" else 4), ("head" if fields.kind == "gemma3_text" else "")
    # Their classes' default width of a head is 256, whatever the hidden size.
    wide = _Fields({"head_dim": 256, **{k: v for k, v in fields._config.items() if v is not None}})
    return _llama_like(wide, norms=norms, qk_norm=qk_norm, qkv=bias, out=bias, tied=True)


def _cohere(fields: _Fields) -> CausalModel:
    bias = fields.flag("attention_bias")
    if fields.flag("use_qk_norm"):
        raise QlfError("config.json: a cohere model with use_qk_norm is not known to the estimate")
    return _llama_like(fields, norms=1, qkv=bias, out=bias, tied=True)


def _stablelm(fields: _Fields) -> CausalModel:
    if fields.flag("qk_layernorm"):
        raise QlfError("config.json: a stablelm model with qk_layernorm is not known to the estimate")
    norms = 1 if fields.flag("use_parallel_residual") else 2
    return _llama_like(fields, norms=norms, norm_bias=True, qkv=fields.flag("use_qkv_bias"), rms=False)


def _starcoder2(fields: _Fields) -> CausalModel:
    bias = fields.flag("use_bias", True)
    return _llama_like(fields, norm_bias=True, qkv=bias, out=bias, mlp=bias, tied=True, gated=False, rms=False)


def _plain(
    fields: _Fields, names: tuple[str, ...], *, inner: int, biases: tuple[bool, bool, bool], norms: int = 2,
    kv: int | None = None, fused: bool = True, norm_bias: bool = True, rotated: bool = False, **parts: Any,
) -> CausalModel:  # fmt: skip
    """GPT-2 and its relatives. names: of qkv (one layer or three), out, up and down; biases: of qkv, out, mlp."""
    hidden = fields.heads()[0]
    kv = hidden if kv is None else kv
    into = [hidden + 2 * kv] if fused else [hidden, kv, kv]
    first = [Linear(name, hidden, outputs, biases[0]) for name, outputs in zip(names, into, strict=False)]
    linears = (*first, Linear(names[-3], hidden, hidden, biases[1]), Linear(names[-2], hidden, inner, biases[2]),
               Linear(names[-1], inner, hidden, biases[2]))  # fmt: skip
    size = hidden * (2 if norm_bias else 1)
    return fields.model(linears=linears, attention=hidden, kv=kv, inner=inner, norms=norms * size, fused=rotated,
                        normed=parts.pop("normed", norms * hidden), final=parts.pop("final", size),
                        **parts)  # fmt: skip


def _gpt2(fields: _Fields) -> CausalModel:
    inner = fields.size("n_inner", default=4 * fields.size("n_embd"))
    names = ("c_attn", "c_proj", "c_fc", "c_proj")
    return _plain(fields, names, inner=inner, biases=(True,) * 3, tied=True, positions=fields.size("n_positions"))


def _gpt_neo(fields: _Fields) -> CausalModel:
    inner = fields.size("intermediate_size", default=4 * fields.size("hidden_size"))
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
    return _plain(fields, names, inner=inner, biases=(False, True, True), fused=False, tied=True,
                  positions=fields.size("max_position_embeddings"))  # fmt: skip


def _gptj(fields: _Fields) -> CausalModel:
    inner = fields.size("n_inner", default=4 * fields.size("n_embd"))
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")
    return _plain(fields, names, inner=inner, biases=(False, False, True), fused=False, norms=1, head_bias=True)


def _gpt_neox(fields: _Fields) -> CausalModel:
    names, bias = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), fields.flag("attention_bias", True)
    hidden, parallel = fields.size("hidden_size"), fields.flag("use_parallel_residual", True)
    # Two norms, of one and the same input where attention and feed-forward are side by side.
    return _plain(fields, names, inner=fields.size("intermediate_size"), biases=(bias, bias, True), rotated=True,
                  normed=hidden if parallel else 2 * hidden)  # fmt: skip


def _phi(fields: _Fields) -> CausalModel:
    _, _, kv_heads, width = fields.heads()
    if fields.flag("qk_layernorm"):
        raise QlfError("config.json: a phi model with qk_layernorm is not known to the estimate")
    names = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    return _plain(fields, names, inner=fields.size("intermediate_size"), biases=(True,) * 3, fused=False, norms=1,
                  kv=kv_heads * width, head_bias=True)  # fmt: skip


def _opt(fields: _Fields) -> CausalModel:
    hidden, bias = fields.size("hidden_size"), fields.flag("enable_bias", True)
    width = fields.size("word_embed_proj_dim", default=hidden)
    affine = fields.flag("layer_norm_elementwise_affine", True)
    before = fields.flag("do_layer_norm_before", True) and not fields.flag("_remove_final_layer_norm")
    outer = (Linear("project_in", width, hidden), Linear("project_out", hidden, width)) if width != hidden else ()
    names = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")
    # Its table of positions has two rows more than it has positions.
    return _plain(fields, names, inner=fields.size("ffn_dim"), biases=(bias,) * 3, fused=False, tied=True,
                  norms=2 if affine else 0, final=2 * hidden if affine and before else 0, outer=outer,
                  embedding_width=width, positions=fields.size("max_position_embeddings") + 2)  # fmt: skip


def _falcon(fields: _Fields) -> CausalModel:
    hidden, heads, _, _ = fields.heads()
    new, bias = fields.flag("new_decoder_architecture"), fields.flag("bias")
    kv_heads = fields.size("num_kv_heads", default=heads) if new else 1 if fields.flag("multi_query", True) else heads
    both = fields.size("num_ln_in_parallel_attn", default=2 if new else 1) == 2 or not fields.flag(
        "parallel_attn", True
    )
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return _plain(fields, names, inner=fields.size("ffn_hidden_size", default=4 * hidden), biases=(bias,) * 3,
                  kv=kv_heads * (hidden // heads), norms=2 if both else 1, tied=True,
                  rotated=not fields.flag("alibi"))  # fmt: skip


def _bloom(fields: _Fields) -> CausalModel:
    hidden = fields.size("hidden_size", "n_embed")
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return _plain(fields, names, inner=4 * hidden, biases=(True,) * 3, final=4 * hidden, tied=True)


def _mpt(fields: _Fields) -> CausalModel:
    names, inner = ("Wqkv", "out_proj", "up_proj", "down_proj"), fields.size("expansion_ratio", default=4)
    if not fields.flag("no_bias", True):
        raise QlfError("config.json: an mpt model with biases is not known to the estimate")
    return _plain(fields, names, inner=inner * fields.size("d_model"), biases=(False,) * 3, norm_bias=False, tied=True)


_FAMILIES: Mapping[str, Callable[[_Fields], CausalModel]] = MappingProxyType(
    {
        "llama": _llama, "smollm3": _llama, "granite": _llama, "mistral": _llama_like, "qwen3": _qwen3,
        "qwen2": lambda fields: _llama_like(fields, qkv=True),
        "phi3": lambda fields: _llama_like(fields, fused=True),
        "olmo2": lambda fields: _llama_like(fields, qk_norm="whole"),
        "gemma": _gemma, "gemma2": _gemma, "gemma3_text": _gemma, "cohere": _cohere, "stablelm": _stablelm,
        "starcoder2": _starcoder2, "gpt2": _gpt2, "gpt_neo": _gpt_neo, "gptj": _gptj, "gpt_neox": _gpt_neox,
        "phi": _phi, "opt": _opt, "falcon": _falcon, "bloom": _bloom, "mpt": _mpt,
    }
)  # fmt: skip
FAMILIES = tuple(_FAMILIES)
"""The model types that are known."""
