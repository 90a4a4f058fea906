"""Packed equals one by one, lean equals PEFT's, micro-batched equals whole; what is refused."""

import pytest
import torch
import transformers
from torch.nn import functional as F

import backbones
from common import ARMS, Batch, StudyModel, lm_loss
from training import seed_everything

LENGTHS = [5, 1, 9, 3, 3, 7]


def tiny(folder, kind="qwen2", texts=("the film is good", "a bad story"), **options):
    """A tiny random model with its tokenizer in `folder`."""
    backbones.tiny_model(folder, texts, kind, **options)
    return str(folder)


@pytest.fixture(scope="session", params=["qwen2", "llama"])
def folder(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


def loaded(folder, **options):
    defaults = {"quantise": "none", "dtype": "float32", "max_tokens": 32}
    return backbones.load(str(folder), **(defaults | options))


def random_texts(vocabulary, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    labels = torch.arange(len(lengths)) % 2
    return Batch(tokens, torch.tensor(lengths), labels, torch.arange(len(lengths)))


def trained_like(backbone, seed=3):
    """LoRA weights as after some training: B is not zero."""
    torch.manual_seed(seed)
    backbone.reset()
    for layer in backbone.adapted:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return backbone


def one_by_one(backbone, batch, prefix=None):
    """Hidden states by the library's own forward with eager attention, a text at a time."""
    causal = backbone.model.get_base_model()
    causal.set_attn_implementation("eager")
    rows = []
    for i, tokens in enumerate(batch.tokens.split(batch.lengths.tolist())):
        x = causal.get_input_embeddings()(tokens)
        if prefix is not None:
            x = torch.cat([prefix[i : i + 1].to(x.dtype), x])
        out = causal.base_model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        rows.append(out[0 if prefix is None else 1 :])
    causal.set_attn_implementation(backbones.ATTENTION)
    return torch.cat(rows)


def gradients(backbone):
    found = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.requires_grad}
    for parameter in backbone.parameters():
        parameter.grad = None
    return found


def worst(left, right):
    """Largest difference relative to the largest value."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-12))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("recompute", ["off", "on"])
def test_packed_equals_one_by_one(folder, with_prefix, recompute):
    lean = trained_like(loaded(folder, recompute=recompute).backbone).eval()
    plain = trained_like(loaded(folder, lean=False).backbone).eval()
    if recompute == "on":
        lean.train()
        for layer in lean.adapted:
            layer.forward.rate = 0.0
    batch = random_texts(50)
    prefix = torch.randn(len(batch), lean.hidden_size) if with_prefix else None
    weights = torch.randn(len(batch.tokens), lean.hidden_size)
    results = []
    for backbone, run in ((lean, lean), (plain, lambda b, p: one_by_one(plain, b, p))):
        hidden = run(batch, prefix)
        lm = lm_loss(hidden, batch, backbone.unembedding).total
        ((hidden * weights).sum() + lm).backward()
        results.append(([hidden, lm], gradients(backbone)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert worst(ours, theirs) < 1e-5
    assert our_gradients.keys() == their_gradients.keys()
    assert worst(our_gradients.values(), their_gradients.values()) < 1e-5
