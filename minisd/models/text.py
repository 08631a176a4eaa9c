"""The CLIP text encoder (Radford et al. 2021, arXiv 2103.00020)."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.models.layers import LayerNorm, multi_head


@dataclass(kw_only=True)
class TextConfig:
    """The defaults are those of Stable Diffusion v1.5."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_positions: int = 77
    activation: str = "quick_gelu"  # a key of ACTIVATIONS
    eps: float = 1e-5


SD15 = TextConfig()

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Causal multi-head attention: (b, s, d) -> (b, s, d)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (b, s, d)
        return self.out_proj(multi_head(q, k, v, self.num_heads, causal=True))  # (b, s, d)


class Layer(nn.Module):
    """Self-attention and MLP, each after a LayerNorm and added to its input: (b, s, d) -> (b, s, d)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.activation]
        self.layer_norm1 = LayerNorm(d, eps=config.eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(d, eps=config.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, hidden), "fc2": nn.Linear(hidden, d)})

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.layer_norm2.add(self.self_attn(self.layer_norm1(x)), x)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(h)))  # (b, s, d)


class Embeddings(nn.Module):
    """The sum of token and position embeddings: ids (b, s) -> (b, s, d)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[-1]]  # (b, s, d)


class TextEncoder(nn.Module):
    """Token ids (b, s) -> context (b, s, d): the states of the last layer, or of the layer `skip` before it,
    after the final LayerNorm. Padding is attended to, as in the training of SD."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        norm = LayerNorm(config.hidden_size, eps=config.eps)
        # Nested like the published names.
        encoder = nn.ModuleDict({"layers": layers})
        model = {"embeddings": embeddings, "encoder": encoder, "final_layer_norm": norm}
        self.text_model = nn.ModuleDict(model)

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        model = self.text_model
        x = model.embeddings(ids)  # (b, s, d)
        for layer in model.encoder.layers[: self.config.num_layers - skip]:
            x = layer(x)
        return model.final_layer_norm(x)  # (b, s, d)
