"""Models of GPT-2's sizes with random weights and tied embeddings, made from a configuration: nothing is downloaded."""

from __future__ import annotations

from typing import Any

SIZES = {
    "gpt2": {"options": {}, "dtype": "float32"},  # 124 M parameters, 498 MB
    "gpt2-xl": {"options": {"n_embd": 1600, "n_layer": 48, "n_head": 25}, "dtype": "bfloat16"},  # 1.5 G, 3.1 GB
}


def build(name: str) -> Any:
    """Return the module in eval mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    size = SIZES[name]
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**size["options"])).to(getattr(torch, size["dtype"]))
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    return model.eval()


def regions(model: Any) -> list[memoryview]:
    """Return the model's memory, each storage once, ties included once."""
    import torch

    views = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            views[storage.data_ptr()] = memoryview(flat.numpy())
    return list(views.values())
