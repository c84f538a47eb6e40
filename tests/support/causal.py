"""Tiny causal models of transformers, as sure of their next token as trained ones, and a slow reference for them."""

import torch


STOP, FILL = 30, 29  # of a vocabulary of 32


def causal_model(kind: str = "llama", seed: int = 0, layers: int = 2, width: int = 16, vocab_size: int = 32, **config):
    """A random Llama or Qwen2 whose tokens repeat themselves after a while, so that drafts are accepted at times.

    Args:
        kind: "llama" or "qwen2".
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    families = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = families[kind]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = model_class(config_class(**(sizes | config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 1.0 if "embed_tokens" in name else 1.5 * weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                weight.zero_()
    return model.eval()


def plain_greedy(model, prompt: list[int], count: int, stops: tuple[int, ...] = ()) -> list[int]:
    """New tokens, one whole forward without a cache for each; the stop token is the last one."""
    ids, new = torch.tensor([prompt]), []
    with torch.no_grad():
        while len(new) < count and not (new and new[-1] in stops):
            new.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    return new


def chain_model(following: list[int], layers: int = 2):
    """A Llama whose next token is a table's: attention and MLP add nothing, the head looks the last token up.

    Every layer says the same, so that a draft after the first is always right, and forwards can be counted by hand.
    """
    size = len(following)
    model = causal_model(layers=layers, width=size, vocab_size=size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for token, after in enumerate(following):
            model.lm_head.weight[after, token] = 4
    return model
