"""The shape of a decoder: what Llama, Mistral, Qwen2, Qwen3 and GPT-2 have in common and apart."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched as in Llama 3; fields carry Hugging Face's names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor <= 0:
            raise ValueError(
                "Rope scaling needs factor > 0 and 0 < low_freq_factor < high_freq_factor, got "
                f"{self.factor}, {self.low_freq_factor} and {self.high_freq_factor}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The shape of a decoder; fields carry the names of Hugging Face's configs.

    The defaults are Llama's. Mistral adds `sliding_window`, Qwen2 `qkv_bias`, Qwen3 `qk_norm`, and
    GPT-2 differs in everything that `is_gpt2` lists.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    """epsilon of every norm, GPT-2's LayerNorm too"""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    image_token_id: int | None = None
    """token whose embeddings are replaced by image embeddings, in order"""
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """how many tokens a token sees, itself among them; None is all"""
    max_window_layers: int = 0
    """the first layer with the window; those below it see all"""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of every query and key head before the rotation"""
    is_gpt2: bool = False
    """LayerNorm, learned positions, an ungated MLP with gelu_new, a bias in every layer"""
    fused_qkv: bool = False
    """one matrix gives queries, keys and values: its singular values are another set than theirs"""

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim < 1:
            raise ValueError(f"`head_dim` must be at least 1, got {self.head_dim}.")
        if self.head_dim % 2 and not self.is_gpt2:
            raise ValueError(f"Rotary positions need an even `head_dim`, got {self.head_dim}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window` must be at least 1, got {self.sliding_window}.")

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token sees in `layer`; None is all."""
        return self.sliding_window if layer >= self.max_window_layers else None
