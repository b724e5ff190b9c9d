"""attn_implementation="cvfast": small models with random weights, against eager attention in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from cvfast.integrations.transformers import attention, register
from cvfast.testing.accuracy import relative_error

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"input_ids": torch.arange(20).view(2, 10) % 50}
PADDED = {**TEXT, "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4])}
PICTURES = {"pixel_values": torch.randn(2, 3, 32, 32)}
MODELS = {
    "bert": (lambda t: t.BertConfig(vocab_size=50, **SMALL), PADDED),
    "vit": (lambda t: t.ViTConfig(image_size=32, patch_size=8, **SMALL), PICTURES),
    "gpt2": (lambda t: t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4), PADDED),
    "llama": (lambda t: t.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL), PADDED),
    "llama, not padded": (lambda t: t.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL), TEXT),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    register()
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(make(transformers), attn_implementation="cvfast").eval()
    eager = copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    seen = inputs.get("attention_mask", torch.ones(2, 10)).bool() if "input_ids" in inputs else slice(None)
    with torch.no_grad():
        expected = eager(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        with torch.profiler.profile() as profile:
            output = model(**inputs)
    assert "cvfast_kernels::attention" in {event.key for event in profile.key_averages()}
    assert relative_error(output.last_hidden_state[seen], expected.last_hidden_state[seen]) < 2e-6


def test_generation_is_the_same():
    """One query at a time, against cached keys."""
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = []
    for implementation in ("cvfast", "eager"):
        model.set_attn_implementation(implementation)
        tokens.append(model.generate(TEXT["input_ids"], max_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)


def test_position_bias_and_masks():
    query, bias = torch.randn(2, 2, 5, 4), torch.randn(1, 2, 5, 5)
    causal = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, query, query, bias.masked_fill(~causal, -torch.inf)
    )
    added = torch.zeros(2, 1, 5, 5).masked_fill(~causal, -torch.inf)
    layer = torch.nn.Module()
    for mask in (causal, added, None):
        output, _ = attention(layer, query, query, query, mask, position_bias=bias)
        torch.testing.assert_close(output.transpose(1, 2), expected)
    with pytest.raises(ValueError, match="no softcap, got 30"):
        attention(layer, query, query, query, None, softcap=30)
