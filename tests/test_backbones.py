"""Packed equals one by one, lean equals PEFT's, micro-batched equals whole; what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import adapters
import backbones
import lora
import pretrained as pretrained_module
from arms import ARMS
from batches import Encoded, encode
from benchmarks import random_backbone
from common import Batch, StudyModel, UserError, lm_loss, mean_pool
from data import Split
from parts import parts_of
from recipe import Recipe, seed_everything
from training import Fit

LENGTHS = [5, 1, 9, 3, 3, 7]


def tiny(folder, kind="qwen2", texts=("the film is good", "a bad story"), **options):
    """A tiny random model with its tokenizer in `folder`."""
    pretrained_module.tiny_model(folder, texts, kind, **options)
    return str(folder)


@pytest.fixture(scope="session", params=["qwen2", "llama", "mistral"])
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


def without_dropout(backbone):
    layers = backbone.decoder.layers if backbone.decoder else []
    lean = [layer.forward for layer in backbone.adapted if isinstance(layer.forward, lora.LeanLora)]
    for siblings in [g for layer in layers for g in layer.groups] + [x.siblings for x in lean]:
        siblings.rate = 0.0


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
        without_dropout(lean.train())
    batch = random_texts(50)
    prefix = torch.randn(len(batch), lean.hidden_size) if with_prefix else None
    weights = torch.randn(len(batch.tokens), lean.hidden_size)
    results = []
    for backbone, run in ((lean, lean), (plain, lambda b, p: one_by_one(plain, b, p))):
        hidden = run(batch, prefix)
        lm = lm_loss(hidden, batch, backbone.unembedding).total
        ((hidden * weights).sum() + lm).backward()
        results.append(([hidden, mean_pool(hidden, batch), lm], gradients(backbone)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert worst(ours, theirs) < 1e-5
    assert our_gradients.keys() == their_gradients.keys()
    assert worst(our_gradients.values(), their_gradients.values()) < 1e-5


def test_changing_one_text_leaves_the_others_numbers_alone(folder):
    backbone = trained_like(loaded(folder).backbone).eval()
    batch = random_texts(50)
    prefix = torch.randn(len(batch), backbone.hidden_size)
    before = backbone(batch, prefix).detach()
    for changed in (0, 2, 5):
        of_text = batch.segments == changed
        other = torch.where(of_text, (batch.tokens + 1) % 50, batch.tokens)
        after = backbone(replace(batch, tokens=other), prefix).detach()
        assert torch.equal(after[~of_text], before[~of_text])
        assert not torch.allclose(after[of_text], before[of_text])


def test_no_position_sees_a_later_one(folder):
    backbone = trained_like(loaded(folder).backbone).eval()
    batch = random_texts(50, [7])
    embedded = []
    layer = backbone.model.get_base_model().get_input_embeddings()
    hook = layer.register_forward_hook(
        lambda m, i, out: embedded.append(out.detach().requires_grad_()) or embedded[-1]
    )
    backbone(batch)[3].sum().backward()
    hook.remove()
    gradient = embedded[0].grad.abs().sum(1)
    assert (gradient[:4] > 0).all()
    assert (gradient[4:] == 0).all()


def test_nf4_lean_equals_the_plain_peft_path(tmp_path):
    """float32 compute on the same 4-bit weights: the two differ by rounding alone."""
    source = tiny(tmp_path / "m", hidden_size=64, intermediate_size=128)
    batch, weights = random_texts(50), torch.randn(sum(LENGTHS), 64)
    found = []
    for lean in (True, False):
        backbone = trained_like(loaded(source, quantise="nf4", lean=lean).backbone)
        # the plain path in training mode, without its dropout: 4-bit layers change kernel else
        for layer in backbone.adapted:
            layer.lora_dropout["default"].p = 0.0
        without_dropout(backbone)
        hidden = backbone.train()(batch) if lean else one_by_one(backbone.train(), batch)
        (hidden * weights).sum().backward()  # squares would be constant after the norm
        found.append(([hidden], gradients(backbone)))
        assert backbone.parameters_packed_away > 0
    (ours, our_gradients), (theirs, their_gradients) = found
    assert worst(ours, theirs) < 1e-5
    assert worst(our_gradients.values(), their_gradients.values()) < 1e-5


def test_resident_weights_are_those_dequantised_on_use(tmp_path):
    source = tiny(tmp_path / "m", hidden_size=64)
    backbone = trained_like(loaded(source, quantise="nf4", dtype="bfloat16").backbone).eval()
    kept = backbone(random_texts(50))
    backbone.make_lean(resident_bytes=0.0)
    assert torch.equal(backbone(random_texts(50)), kept)
    assert kept.dtype == torch.bfloat16
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "limit"),
    [("dual", 12), ("dual_engram", 14), ("dual_engram_self", 12), ("dual_engram_same_class", 9)],
)
def test_micro_batches_equal_the_whole_step(tmp_path, name, limit):
    backbone = trained_like(loaded(tiny(tmp_path / "m")).backbone)
    model = StudyModel(backbone, ARMS[name], 2, 8).eval()
    batch = random_texts(50, [5, 1, 9, 3, 3, 7, 2, 8])
    recipe = Recipe(1, 1e-3, 0.0, 8, 1e9, "cosine", lm_dtype="float32")
    found = []
    for tokens in (0, limit):
        parts = parts_of(model.arm, batch, tokens)
        assert (len(parts) > 1) == (tokens > 0)
        fit = Fit(model, replace(recipe, micro_batch_tokens=tokens), data_of(batch), None, 0)
        fit.optimizer.step = lambda: None
        fit.step(batch)
        kept = {n: p.grad.clone() for n, p in fit.parameters.items() if p.grad is not None}
        found.append((kept, fit.progress.totals))
    (whole, totals), (split, split_totals) = found
    assert whole.keys() == split.keys()
    assert worst(split.values(), whole.values()) < 1e-5
    assert (split_totals.texts, split_totals.targets) == (totals.texts, totals.targets)
    assert split_totals.cls == pytest.approx(totals.cls, rel=1e-5)
    assert split_totals.lm == pytest.approx(totals.lm, rel=1e-5)


def data_of(batch):
    offsets = torch.cat([batch.starts, batch.lengths.sum()[None]]).numpy()
    return Encoded(batch.tokens, offsets, batch.labels, 0)


def test_a_split_keeps_every_giver_with_its_receiver():
    batch = random_texts(50, [5, 1, 9, 3, 3, 7, 2, 8])
    parts = parts_of(ARMS["dual_engram"], batch, 14)
    givers = torch.cat([p.first.items for p in parts])
    pairs = [(int(p.first.items[s]), int(i)) for p in parts
             for s, i in zip(p.source, p.second.items, strict=True)]  # fmt: skip
    assert givers.tolist() == [0, 1, 2, 3]
    assert pairs == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert all(len(p.first.tokens) + len(p.second.tokens) <= 14 for p in parts)


def test_dropout_drops_at_its_rate_and_its_gradient_is_that_of_the_equation():
    torch.manual_seed(0)
    x = torch.randn(40, 24, requires_grad=True)
    weight, a, b = torch.randn(16, 24), torch.randn(4, 24), torch.randn(16, 4)
    a, b, bias = a.requires_grad_(), b.requires_grad_(), torch.randn(16)
    module = torch.nn.Module().train()
    frozen = lora.Frozen([lambda: weight], [bias], keep=False)
    layer = lora.LeanLora(lora.Siblings(frozen, [16], [(0, a, b)], 2.0, 0.3), module)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    mask = lora.keep_mask(int(torch.randint(2**62, ())), x.numel(), 0.3, x.device).view_as(x) != 0
    wanted = x @ weight.T + bias + 2.0 * (x * mask / 0.7) @ a.T @ b.T
    assert torch.allclose(out, wanted, atol=1e-4)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, a, b), upstream)
    theirs = torch.autograd.grad(wanted, (x, a, b), upstream)
    assert worst(ours, theirs) < 1e-5
    for dtype in (torch.float32, torch.bfloat16):
        ones = torch.ones(1000, 1000, dtype=dtype)
        kept = lora.masked(ones, lora.keep_mask(5, ones.numel(), 0.05, ones.device).view_as(ones))
        assert float(kept.float().mean()) == pytest.approx(0.95, abs=0.001)


def test_recomputation_draws_the_same_dropout(tmp_path):
    source = tiny(tmp_path / "m")
    found = []
    for recompute in ("off", "on"):
        backbone = trained_like(loaded(source, recompute=recompute).backbone).train()
        torch.manual_seed(7)
        backbone(random_texts(50))[:, :5].sum().backward()
        found.append(gradients(backbone))
    assert all(torch.equal(found[0][n], g) for n, g in found[1].items())


def test_an_arm_starts_from_its_seed_whatever_ran_before(tmp_path):
    pretrained = loaded(tiny(tmp_path / "m"))
    first = {n: w.clone() for n, w in seeded(pretrained).items()}
    trained_like(pretrained.backbone)
    again = seeded(pretrained)
    assert all(torch.equal(first[n], w) for n, w in again.items())
    assert all((w == 0).all() for n, w in first.items() if "lora_B" in n)
    with pytest.raises(UserError, match="not causal"):
        pretrained.make_backbone(ARMS["published_small"])


def seeded(pretrained):
    seed_everything(4, "initialisation")
    return pretrained.make_backbone(ARMS["dual"]).adapter_state()


def test_trained_adapters_come_back_by_our_function_and_by_peft(tmp_path):
    source = tiny(tmp_path / "m")
    pretrained = loaded(source)
    model = StudyModel(trained_like(pretrained.backbone), ARMS["dual_engram"], 3, 8).eval()
    out = tmp_path / "adapters" / "dual_engram-0"
    adapters.save(pretrained, model, out, ["a", "b", "c"], 32)
    texts = ["a good film", "bad", "the story of a film <|endoftext|> again"]
    back = adapters.load_trained(out)
    found = back.predict(texts, tokens_per_batch=8)
    ids = pretrained.tokenize(texts)
    encoded = encode(Split("texts", texts, np.zeros(3, np.int64)), pretrained.tokenize, 32)
    batch = encoded.batch(np.arange(3))
    with torch.no_grad():
        direct = model(batch, model.zero_engram(batch))
    assert torch.allclose(found.probabilities, direct.logits.softmax(1), atol=1e-6)
    assert torch.allclose(found.engrams, direct.engram, atol=1e-6)
    assert back.classes == ("a", "b", "c")

    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    theirs = PeftModel.from_pretrained(base, out).eval().get_base_model().base_model
    with torch.no_grad():
        hidden = theirs(input_ids=torch.tensor(ids[2])[None]).last_hidden_state[0]
        ours = back.model.backbone(batch)[-len(ids[2]) :]
    assert worst([ours], [hidden]) < 1e-5

    (out / "heads.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="no whole adapters folder"):
        adapters.load_trained(out)
    adapters.save(pretrained, model, out, ["a", "b", "c"], 32)
    other = tiny(tmp_path / "other", hidden_size=48, num_attention_heads=4)
    with pytest.raises(UserError, match="other weights"):
        adapters.load_trained(out, backbone=other)


def test_text_that_spells_a_special_token_stays_text_and_padding_means_nothing(folder):
    pretrained = loaded(folder)
    tokenizer = pretrained.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = pretrained.tokenize(["film <|endoftext|> film"])[0]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "film <|endoftext|> film"
    # and were its id in a text all the same, it would be a token like any other
    backbone = pretrained.backbone.eval()
    batch = random_texts(50)
    batch.tokens[::3] = tokenizer.pad_token_id
    assert worst([backbone(batch)], [one_by_one(backbone, batch)]) < 1e-5


def test_layers_are_the_embedding_the_middle_and_the_last_state(folder):
    backbone = loaded(folder).backbone.eval()
    batch, layers = random_texts(50), []
    hidden = backbone(batch, layers=layers)
    assert [tuple(x.shape) for x in layers] == [tuple(hidden.shape)] * backbones.DEPTHS
    embedding = backbone.model.get_base_model().get_input_embeddings()
    assert torch.equal(layers[0], embedding(batch.tokens))
    assert torch.equal(layers[-1], hidden)


def test_another_architecture_finds_its_layers(tmp_path):
    gpt2 = tiny(tmp_path / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    backbone = trained_like(loaded(gpt2).backbone).eval()
    assert backbone.adapter_config.target_modules == {"c_attn", "c_proj", "c_fc"}
    batch = random_texts(50)
    assert worst([backbone(batch)], [one_by_one(backbone, batch)]) < 1e-5
    with pytest.raises(UserError, match=r"q_proj.*--lora-targets from: c_attn c_fc c_proj"):
        loaded(gpt2, lora_targets=["q_proj"])


def write_other(folder, kind):
    if kind == "t5":
        config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    elif kind == "bert":
        tiny(folder)
        config = transformers.BertConfig(
            vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, is_decoder=False,
        )  # fmt: skip
        transformers.BertLMHeadModel(config).save_pretrained(folder)
    elif kind == "no config":
        folder.mkdir()
    elif kind == "truncated":
        weights = Path(tiny(folder)) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "missing":
        weights = Path(tiny(folder)) / "model.safetensors"
        kept = {n: w for n, w in load_file(weights).items() if "layers.1.mlp" not in n}
        save_file(kept, weights, {"format": "pt"})
    elif kind == "mismatched":
        config = Path(tiny(folder)) / "config.json"
        config.write_text(config.read_text().replace('ate_size": 64', 'ate_size": 80'))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "not a causal language model"),
        ("bert", "sees later words"),
        ("no config", "no config.json"),
        ("truncated", "truncated or damaged"),
        ("missing", "not whole: 3 missing keys"),
        ("mismatched", "not whole|cannot load"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, kind, message):
    write_other(tmp_path / "m", kind)
    with pytest.raises(UserError, match=message) as error:
        loaded(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [4, 14])
def test_a_faint_look_ahead_is_seen(tmp_path, seed):
    torch.manual_seed(seed)  # with these, one changed word hardly moves the states before it
    write_other(tmp_path / "m", "bert")
    with pytest.raises(UserError, match="sees later words"):
        loaded(tmp_path / "m")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("Qwen/Qwen2.5-7B", "7.0 billion parameters and this machine has no CUDA GPU"),
        ("nobody/no-such-model", "HF_HUB_OFFLINE is set"),
        ("no/such/folder", "no model folder"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(source, message):
    with pytest.raises(UserError, match=message):
        loaded(source)


def test_limits_are_known_before_loading(tmp_path, monkeypatch):
    source = tiny(tmp_path / "m")
    monkeypatch.setattr(backbones, "load_weights", None)
    with pytest.raises(UserError, match=r"--max-tokens must be 2\.\.511"):
        loaded(source, max_tokens=512)
    with pytest.raises(UserError, match=r"m needs about 4\.\d GiB, this machine has .* free"):
        monkeypatch.setattr(pretrained_module.os, "sysconf", lambda name: 2**15)
        loaded(source, pass_tokens=20_000_000)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    notes = []
    assert pretrained_module.choose_dtype("auto", torch.device("cuda"), notes) == torch.float32
    assert "no bfloat16" in notes[0]
    monkeypatch.setattr(pretrained_module, "LARGE", 1000)
    with pytest.raises(UserError, match="no CUDA GPU"):
        loaded(source)


def test_a_random_backbone_loads_whole_and_has_the_published_size(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny(tmp_path / "tiny"))
    sizes = dict(random_backbone.SIZES["qwen2.5-7b"])
    kind = sizes.pop("model_type")
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **sizes)
        whole = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in whole.parameters()) == 7_615_616_512  # its model card: 7.61B
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    config = transformers.AutoConfig.for_model(kind, **(sizes | small))
    tokenizer.save_pretrained(tmp_path / "made")
    total = random_backbone.write(tmp_path / "made", config, shard_bytes=10_000)
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 2
    model = loaded(tmp_path / "made", quantise="nf4", dtype="bfloat16").backbone.model
    names = [n for n, _ in model.named_parameters() if "lora" not in n]
    assert total == sum(w.numel() for _, w in random_backbone.weights(config))
    assert len(names) == len(list(random_backbone.weights(config)))
