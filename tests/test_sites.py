"""Places of models: right names, right rows, readable refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers
from torch import nn

from espalier.errors import SiteError
from espalier.places import Rows, Site, Sites, sites
from golden_sites import BLOCKS, GOLDEN, MODELS

transformers.logging.set_verbosity_error()


def build(name: str, device: str = "meta", **more) -> nn.Module:
    config, model, settings = MODELS[name]
    with torch.device(device):
        made = getattr(transformers, model)(
            getattr(transformers, config + "Config")(**copy.deepcopy(settings), **more)
        )
    return made.eval()


@cache
def model(name: str) -> nn.Module:
    return build(name)


@cache
def places(name: str) -> Sites:
    return sites(model(name))


def line(site: Site, inside: str = "") -> str:
    words = [site.role, site.path.removeprefix(inside), str(site.n_in), str(site.n_out)]
    if site.rows:
        r = site.rows
        words += ["rows", f"{r.groups}:{r.width}:{r.start}-{r.stop}"]
    if site.enter:
        words += ["from", site.enter.removeprefix(inside)]
    return " ".join(words)


# ------------------------------------------------------------------------------- many families


@pytest.mark.parametrize("name", MODELS)
def test_roles_partition_the_modules(name):
    found = places(name)
    modules = dict(model(name).named_modules(remove_duplicate=False))
    hosts = [s for s in found if not s.rows and not s.enter]
    paths = [s.path for s in hosts]
    assert len(paths) == len(set(paths))
    assert all(s.path in modules for s in found)
    assert all(s.enter is None or s.enter in modules for s in found)
    # Nothing is dropped: each linear, Conv1D, Conv2d and embedding is a host or said to be none.
    told = {path for path, _ in found.notes.bare}
    for path, module in modules.items():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | transformers.Conv1D):
            inside_told = any(path == t or path.startswith(t + ".") for t in told)
            assert (path in paths) != inside_told


@pytest.mark.parametrize("name", MODELS)
def test_widths_and_layers_are_sound(name):
    found = places(name)
    modules = dict(model(name).named_modules(remove_duplicate=False))
    for site in found:
        if site.kind == "linear" and not site.enter and not site.rows:
            assert (site.n_out, site.n_in) == modules[site.path].weight.shape
        if site.kind == "conv1d" and not site.enter and not site.rows:
            assert (site.n_in, site.n_out) == modules[site.path].weight.shape
        if site.rows:
            whole = next(s for s in found if s.path == site.path and not s.rows)
            assert site.n_out == site.rows.size
            assert site.rows.groups * site.rows.width == whole.n_out
        if site.kind == "conv2d":
            assert site.conv is not None
    for fused in (s for s in found if s.role.endswith(("qkv", ".kv", "gate_in"))):
        slices = [s for s in found if s.path == fused.path and s.rows]
        assert not slices or sum(s.n_out for s in slices) == fused.n_out
    blocks = [s for s in found if s.role == "block"]
    for stack in found.notes.stacks:
        layers = [s.layer for s in blocks if s.stack == stack]
        assert layers == list(range(len(layers)))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_block(name):
    inside = BLOCKS[name] + "."
    got = {
        line(site, inside)
        for site in places(name)
        if site.path.startswith(inside) and site.kind in ("linear", "conv1d")
    }
    assert got == {" ".join(row.split()) for row in GOLDEN[name].splitlines() if row.strip()}
    assert any(s.role == "block" and s.path == BLOCKS[name] for s in places(name))


HEADS = {
    "bert": ["classifier"],
    "bert-cross": ["cls.predictions.transform.dense", "cls.predictions.decoder"],
    "roberta": ["classifier"],
    "distilbert": ["qa_outputs"],
    "albert": ["predictions.dense", "predictions.decoder"],
    "electra": ["discriminator_predictions.dense", "discriminator_predictions.dense_prediction"],
    "mpnet": ["classifier.dense", "classifier.out_proj"],
    "modernbert": ["head.dense", "decoder"],
    "xlnet": ["lm_loss"],
    "gpt2": ["lm_head"],
    "gpt-neox": ["lm_head"],
    "t5": ["lm_head"],
    "bart": ["lm_head"],
    "whisper": ["proj_out"],
    "vit": ["classifier"],
    "swin": ["classifier"],
    "wav2vec2": ["lm_head"],
    "clip": ["visual_projection", "text_projection"],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    assert [s.path for s in places(name) if s.role == "head"] == HEADS[name]


STACKS = {
    "bert": ("encoder",),
    "bert-cross": ("decoder",),
    "distilbert": ("encoder",),
    "modernbert": ("encoder",),
    "albert": ("encoder",),
    "gpt2": ("decoder",),
    "gptj": ("decoder",),
    "bloom": ("decoder",),
    "mpt": ("decoder",),
    "codegen": ("decoder",),
    "opt": ("decoder",),
    "llama": ("decoder",),
    "mamba": ("decoder",),
    "t5": ("encoder", "decoder"),
    "bart": ("encoder", "decoder"),
    "whisper": ("encoder", "decoder"),
    "vit": ("vision",),
    "dinov2": ("vision",),
    "swin": ("vision",),
    "wav2vec2": ("audio",),
    "clip": ("text", "vision"),
    "blip": ("vision", "text"),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name):
    found = places(name)
    assert found.notes.stacks == STACKS[name]
    assert all(s.stack in STACKS[name] for s in found if s.layer is not None)


EMBEDDINGS = {
    "bert": ["bert.embeddings.word_embeddings"],
    "gpt2": ["transformer.wte"],
    "llama": ["model.embed_tokens"],
    "mamba": ["backbone.embeddings"],
    "opt": ["model.decoder.embed_tokens"],
    # `shared` is never called; each stack has a table of its own, tied to it
    "t5": ["encoder.embed_tokens", "decoder.embed_tokens"],
    "bart": ["model.encoder.embed_tokens", "model.decoder.embed_tokens"],
    "prophetnet": ["prophetnet.encoder.word_embeddings", "prophetnet.decoder.word_embeddings"],
    "whisper": ["model.decoder.embed_tokens"],
    "clip": ["text_model.embeddings.token_embedding"],
    "modernbert": ["model.embeddings.tok_embeddings"],
    "xlnet": ["transformer.word_embedding"],
    "vit": [],
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_word_tables(name):
    assert [s.path for s in places(name) if s.role == "embedding"] == EMBEDDINGS[name]


def test_odd_models():
    albert = [s.layer for s in places("albert") if s.role == "block"]
    assert albert == [0]  # one physical layer, run twice
    xlm = places("xlm")
    assert [s.layer for s in xlm if s.role == "ffn.in"] == [0, 1]
    assert [s.layer for s in xlm if s.role == "attention.q"] == [0, 1]
    swin = places("swin")
    assert [s.layer for s in swin if s.role == "attention.o"] == [0, 1, 2]
    assert swin.unnamed == ("swin.encoder.layers.0.downsample.reduction",)
    told = dict(places("whisper").notes.bare)
    assert told == {"model.encoder.conv1": "Conv1d", "model.encoder.conv2": "Conv1d"}
    assert "transformer.layer.0.rel_attn.q" in dict(places("xlnet").notes.bare)
    patch = next(s for s in places("vit") if s.role == "conv")
    assert (patch.n_in, patch.n_out, patch.layer) == (3, 32, None)
    assert patch.conv is not None
    assert (patch.conv.kernel, patch.conv.stride) == ((8, 8), (8, 8))
    experts = [path for path, _ in places("mixtral").notes.bare]
    assert "model.layers.0.mlp.experts.gate_up_proj" in experts


# ------------------------------------------------------------- the rows really are q, k and v


def take(output: torch.Tensor, rows: Rows) -> torch.Tensor:
    grouped = output.unflatten(-1, (rows.groups, rows.width))
    return grouped[..., rows.start : rows.stop].flatten(-2)


def host_output(net: nn.Module, path: str, run) -> torch.Tensor:
    kept = []
    handle = net.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(out))
    run()
    handle.remove()
    return kept[0]


def slices(net: nn.Module, path: str) -> dict[str, Rows]:
    return {s.role.split(".")[1]: s.rows for s in sites(net) if s.path == path and s.rows}


IDS = torch.tensor([[5]])  # one token, at position 0, where rotary embedding turns nothing


CACHED = ("gpt2", "gpt-neox", "bloom", "falcon-mha", "falcon-mqa", "falcon-new", "phi3", "mpt",
          "persimmon", "gpt-bigcode", "gpt-bigcode-mha")  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_key_and_value_rows_are_what_the_cache_holds(name):
    torch.manual_seed(0)
    net = build(name, device="cpu")
    path = next(s.path for s in sites(net) if s.role == "attention.qkv")
    with torch.no_grad():
        for p in net.get_submodule(path).parameters():
            nn.init.normal_(p)  # no two rows alike, biases not zero
    cache_ = []
    out = host_output(net, path, lambda: cache_.append(net(IDS, use_cache=True).past_key_values))
    layer, rows = cache_[0].layers[0], slices(net, path)
    for part, held in (("k", layer.keys), ("v", layer.values)):
        # Falcon's new architecture caches each key once per query head of its group.
        per_head = held.transpose(1, 2).flatten(0, 2)
        ours = take(out, rows[part]).reshape(-1, per_head.shape[-1])
        ours = ours.repeat_interleave(len(per_head) // len(ours), 0)
        if name == "persimmon" and part == "k":
            ours = net.model.layers[0].self_attn.k_layernorm(ours)
        torch.testing.assert_close(ours, per_head)
    taken = torch.cat([take(torch.arange(out.shape[-1]), rows[p]) for p in "qkv"])
    assert sorted(taken.tolist()) == list(range(out.shape[-1]))


CAPTURED = ("gpt2", "gpt-neox", "phi3", "modernbert", "deepseek-v3")


@pytest.mark.parametrize("name", CAPTURED)
def test_rows_are_what_attention_gets(name):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = {}

    def capture(module, query, key, value, *args, **kwargs):
        seen.setdefault("q", query.transpose(1, 2).flatten(-2))
        seen.setdefault("k", key.transpose(1, 2).flatten(-2))
        seen.setdefault("v", value.transpose(1, 2).flatten(-2))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register("capture", capture)
    torch.manual_seed(0)
    net = build(name, device="cpu")
    net.set_attn_implementation("capture")
    path = next(s.path for s in sites(net) if s.role in ("attention.qkv", "attention.kv"))
    out = host_output(net, path, lambda: net(IDS))
    for part, rows in slices(net, path).items():
        got = seen[part]
        if name == "deepseek-v3" and part == "k":  # without the part that carries positions
            got = got.unflatten(-1, (4, 12))[..., :8].flatten(-2)
        torch.testing.assert_close(take(out, rows).flatten(), got.flatten())


def test_deberta_rows_agree_with_its_own_split():
    net = build("deberta", device="cpu")
    path = next(s.path for s in sites(net) if s.role == "attention.qkv")
    # modeling_deberta: ws[i * 3 + k] over heads i are the rows of q, k, v (k = 0, 1, 2)
    ws = net.get_submodule(path).weight.chunk(4 * 3, dim=0)
    for k, part in enumerate("qkv"):
        theirs = torch.cat([ws[i * 3 + k] for i in range(4)])
        rows = slices(net, path)[part]
        torch.testing.assert_close(take(net.get_submodule(path).weight.T, rows).T, theirs)


@pytest.mark.parametrize("name", ["phi3", "modernbert", "glm"])
def test_gate_rows_go_through_the_activation(name):
    torch.manual_seed(0)
    net = build(name, device="cpu")
    path = next(s.path for s in sites(net) if s.role == "ffn.gate_in")
    mlp, host = net.get_submodule(path.rpartition(".")[0]), net.get_submodule(path)
    x = torch.randn(3, 32)
    with torch.no_grad():
        nn.init.normal_(host.weight)
        before = mlp(x)
        rows = slices(net, path)["in"]
        host.weight[rows.start : rows.stop] *= 2  # linear in this half only
        torch.testing.assert_close(mlp(x), 2 * before)


def test_blip_rows_by_zeroing():
    torch.manual_seed(0)
    net = build("blip", device="cpu")
    attention = net.vision_model.encoder.layers[0].self_attn
    rows = slices(net, "vision_model.encoder.layers.0.self_attn.qkv")
    with torch.no_grad():
        nn.init.normal_(attention.qkv.weight)
        attention.qkv.weight[rows["v"].start : rows["v"].stop] = 0
        assert attention(torch.randn(1, 5, 32))[0].abs().max() == 0


def test_fused_host_of_unknown_layout_is_offered_only_whole():
    found = places("codegen")
    assert "attention.q" not in found.roles
    assert len(found.select("attention.qkv")) == 2
    with pytest.raises(SiteError, match=r"CodeGenAttention lays out its rows is not known.*qkv"):
        found.select("attention.q")
    with pytest.raises(SiteError, match=r"'attention.qkv' to change the whole"):
        found.select("attention.v")


class GPT2Attention(nn.Module):
    """A stranger with a known name: its layout is its own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)


def test_only_transformers_classes_are_trusted():
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": GPT2Attention()})])})
    assert sites(net).roles == ("attention", "block", "attention.qkv", "attention.o")
    assert "not known" in sites(net).notes.unknown["blocks.0.attn.qkv"]


# ------------------------------------------------------------------------------------ selectors


def paths(name: str, selector: str) -> list[str]:
    return [s.path for s in places(name).select(selector)]


def test_roles_families_and_spans():
    assert len(paths("bert", "attention.q")) == 2
    assert {s.role for s in places("bert").select("attention")} == {"attention"}
    parts = [s.role for s in places("bert").select("attention.*")]
    assert parts == ["attention.q", "attention.k", "attention.v", "attention.o"] * 2
    span = places("bert").select("ffn")[0]
    assert span.enter == "bert.encoder.layer.0.intermediate.dense"
    assert [s.role for s in places("llama").select("ffn.*")][:3] == [
        "ffn.gate",
        "ffn.in",
        "ffn.out",
    ]
    assert paths("t5", "decoder/cross.v") == [
        f"decoder.block.{i}.layer.1.EncDecAttention.v" for i in range(2)
    ]


def test_fused_hosts_once():
    whole = [s.role for s in places("phi3").select("attention.*")]
    assert sorted(whole) == ["attention.o", "attention.o", "attention.qkv", "attention.qkv"]
    assert [s.role for s in places("gpt2").select("all-linear")] == [
        "attention.qkv",
        "attention.o",
        "ffn.in",
        "ffn.out",
    ] * 2
    # a slice whose host is taken whole is not taken again
    assert paths("gpt2", "attention.q, attention.qkv@0") == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]
    # without one slice, the others remain
    rest = [s.role for s in places("gpt2").select("attention.*@0, !attention.k")]
    assert rest == ["attention.q", "attention.v", "attention.o"]


def test_all_linear_is_the_blocks_without_head_and_embedding():
    found = places("llama").select("all-linear")
    assert len(found) == 14
    assert all(".layers." in s.path and s.kind == "linear" for s in found)
    assert len(places("mamba").select("all-linear")) == 8


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("@2", [2]),
        ("@1-2", [1, 2]),
        ("@2-", [2, 3]),
        ("@-1", [0, 1]),
        ("@0+3", [0, 3]),
        ("@last2", [2, 3]),
        ("@first1+last1", [0, 3]),
    ],
)
def test_layers(layers, wanted):
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=8
    )
    with torch.device("meta"):
        found = sites(transformers.LlamaForCausalLM(config))
    assert [s.layer for s in found.select("attention.q" + layers)] == wanted


def test_globs_and_exact_paths():
    assert len(paths("llama", "*.q_proj")) == 2
    assert paths("llama", "q_proj") == paths("llama", "*.q_proj") == paths("llama", "attention.q")
    assert paths("llama", "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert paths("llama", "layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert paths("llama", "lm_head") == ["lm_head"]
    assert paths("swin", "*.reduction") == ["swin.encoder.layers.0.downsample.reduction"]
    assert paths("bert", "output.dense@1") == [
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.output.dense",
    ]
    assert [s.kind for s in places("bert").select("*.LayerNorm")] == ["norm"] * 5


def test_exclusion_union_and_order():
    once = paths("bert", "attention.v, attention.q, attention.v, attention.*@0")
    assert once == paths("bert", "attention.*@0, attention.q, attention.v")
    assert once == [s.path for s in places("bert") if s.path in once and not s.enter]
    assert len(paths("llama", "all-linear, !*.down_proj")) == 12
    assert len(paths("llama", "all-linear, !attention.*")) == 6
    assert [s.layer for s in places("llama").select("ffn, !ffn@0")] == [1]
    assert len(paths("gpt2", "attention.*, attention.q, !c_attn")) == 2
    # what is named by module goes, span or not
    assert [s.layer for s in places("bert").select("ffn, !1.output.dense")] == [0]
    with pytest.raises(SiteError, match="leaves out all"):
        places("llama").select("ffn, !ffn")
    with pytest.raises(SiteError, match="what to take before"):
        places("llama").select("!ffn")
    with pytest.raises(SiteError, match="asks for no place"):
        places("llama").select(" , ")


def test_selection_of_a_selection():
    some = places("t5").select("attention.*, cross.*")
    assert len(some.select("decoder/cross.q")) == 2
    assert "cross.q" in str(some)
    with pytest.raises(SiteError):
        some.select("ffn")


@pytest.mark.parametrize(
    ("name", "selector", "says"),
    [
        (
            "bert",
            "cross.v",
            r"no 'cross.v' in BertForSequenceClassification.*it has attention, ffn",
        ),
        ("bert", "ffn.gate", r"no 'ffn.gate'.*ffn.in, ffn.out"),
        ("bert", "attention.w", r"no 'attention.w'"),
        ("bert", "atention.q", r"'atention.q' is no role.*did you mean 'attention.q'"),
        ("bert", "querry", r"did you mean 'query'"),
        ("bert", "all-linears", r"did you mean 'all-linear'"),
        ("bert", "decoder/attention.q", r"no 'attention.q' in a stack 'decoder'.*encoder"),
        ("bert", "attention.q@7-", r"'attention.q@7-' matches no layer.*layers 0-1"),
        ("bert", "attention.q@x", r"cannot read the layers 'x'.*first2"),
        ("bert", "attention.q@last0", "cannot read the layers 'last0'"),
        ("bert", "head@1", r"no layer numbers"),
        ("bert", "a/b/c", r"cannot read the selector 'a/b/c'"),
        ("bert", "all-linear, !cross.q", r"no 'cross.q'"),
        ("whisper", "model.encoder.conv1", r"Conv1d: no place a method can stand on"),
        ("mixtral", "*.experts.down_proj", r"bare parameter: no place"),
        ("xlnet", "attention.q", r"no 'attention.q' in XLNet.*rel_attn.q is a bare parameter"),
        ("mixtral", "ffn.in", r"no 'ffn.in' in Mixtral.*experts.gate_up_proj is a bare parameter"),
        ("gpt-bigcode", "transformer.h.9.attn.c_attn", r"matches no module"),
    ],
)
def test_errors_say_what_was_asked_and_what_there_is(name, selector, says):
    with pytest.raises(SiteError, match=says):
        places(name).select(selector)


# ---------------------------------------------------------------------- tied, quantised, wrapped


def test_tied_weights():
    tied = {s.path: s.tied for s in places("llama-tied")}
    assert tied["model.embed_tokens"] == ("lm_head",)
    assert tied["lm_head"] == ("model.embed_tokens",)
    assert not any(s.tied for s in places("llama"))
    t5 = next(s for s in places("t5") if s.path == "encoder.embed_tokens")
    assert t5.tied == ("shared", "decoder.embed_tokens", "lm_head")


@pytest.mark.parametrize(("kind", "bits"), [("Linear4bit", 4), ("Linear8bitLt", 8)])
def test_quantised_hosts(kind, bits):
    bnb = pytest.importorskip("bitsandbytes")
    net = build("llama", device="cpu")
    for name, module in list(net.model.named_modules()):
        if isinstance(module, nn.Linear):
            packed = getattr(bnb.nn, kind)(module.in_features, module.out_features, bias=False)
            packed.load_state_dict(module.state_dict())
            net.model.set_submodule(name, packed)
    net.to("cpu")  # packs the weights
    if bits == 4:
        assert net.model.layers[0].mlp.down_proj.weight.shape != (32, 48)
    inside = "model.layers.0."
    got = {line(s, inside) for s in sites(net) if s.path.startswith(inside) and s.kind == "linear"}
    assert got == {" ".join(row.split()) for row in GOLDEN["llama"].splitlines() if row.strip()}
    assert {s.bits for s in sites(net).select("all-linear")} == {bits}
    assert sites(net).select("head")[0].bits is None


def test_espaliers_own_modules_are_no_places():
    net = build("bert")
    before = sites(net)
    net.add_module("espalier", nn.ModuleList([nn.Linear(3, 3)]))
    for site in before:
        if "espalier" not in net.get_submodule(site.path)._modules:
            net.get_submodule(site.path).add_module("espalier", nn.Linear(3, 3))
    assert sites(net) == before


def test_wrappers_leave_paths_as_they_are():
    net = build("llama")
    compiled = torch.compile(build("llama"))
    assert sites(compiled) == sites(net)
    assert sites(compiled).notes.model == "LlamaForCausalLM"
    inner = build("llama")
    inner.model.layers[0] = torch.compile(inner.model.layers[0])
    assert sites(inner) == sites(net)
    for site in sites(compiled):
        assert compiled.get_submodule(site.path) is not None


def test_dispatch_hooks_change_nothing():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    net = build("gpt2", device="cpu")
    for module in net.modules():
        add_hook_to_module(module, AlignDevicesHook())
    assert sites(net) == places("gpt2")


# --------------------------------------------------------------------------------- unknown models


def test_plain_torch_transformer():
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False
    )
    found = sites(net)
    assert [(s.path, s.n_in, s.n_out) for s in found.select("ffn.*")][:2] == [
        ("layers.0.linear1", 16, 32),
        ("layers.0.linear2", 32, 16),
    ]
    assert len(found.select("ffn")) == 2
    # MultiheadAttention multiplies by its weights itself: nothing passes through its out_proj.
    assert not any("self_attn" in s.path for s in found)
    assert ("layers.0.self_attn", "MultiheadAttention") in found.notes.bare
    with pytest.raises(SiteError, match=r"no 'attention.q'"):
        found.select("attention.q")


def test_plain_network():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = sites(net)
    assert found.unnamed == ("0", "2")
    assert [s.path for s in found.select("all-linear")] == ["0", "2"]
    assert [s.path for s in found.select("2")] == ["2"]
    assert sites(nn.ReLU()).roles == ()
    assert "No role known for: 0, 2" in str(found)


def test_timm_like_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = nn.LayerNorm(8)
            self.attn = GPT2Attention()
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)})

    net = nn.ModuleDict(
        {
            "patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4, 4)}),
            "blocks": nn.Sequential(Block(), Block()),
            "head": nn.Linear(8, 10),
        }
    )
    found = sites(net)
    assert found.roles == ("attention", "ffn", "block", "attention.qkv", "attention.o", "ffn.in",
                           "ffn.out", "norm", "head", "conv")  # fmt: skip
    assert [s.layer for s in found.select("ffn")] == [0, 1]


# ---------------------------------------------------------------------------- printing and weight


TABLE = """\
GPT2LMHeadModel: 28 places

  role              stack     layers    in → out   count   kind        where (inside its block)
 ────────────────────────────────────────────────────────────────────────────────────────────────
  attention         decoder      0-1     32 → 32       2   conv1d      attn.c_attn → attn.c_proj
  ffn               decoder      0-1     32 → 32       2   conv1d      mlp.c_fc → mlp.c_proj
  block             decoder      0-1          32       2   block       transformer.h.*
  attention.q       decoder      0-1     32 → 32       2   conv1d      attn.c_attn, rows 0-31
  attention.k       decoder      0-1     32 → 32       2   conv1d      attn.c_attn, rows 32-63
  attention.v       decoder      0-1     32 → 32       2   conv1d      attn.c_attn, rows 64-95
  attention.qkv     decoder      0-1     32 → 96       2   conv1d      attn.c_attn
  attention.o       decoder      0-1     32 → 32       2   conv1d      attn.c_proj
  ffn.in            decoder      0-1    32 → 128       2   conv1d      mlp.c_fc
  ffn.out           decoder      0-1    128 → 32       2   conv1d      mlp.c_proj
  norm              decoder      0-1          32       5   norm        ln_1
  embedding         decoder              64 → 32       1   embedding   transformer.wte = lm_head
  embedding.extra   decoder            1024 → 32       1   embedding   transformer.wpe
  head              decoder              32 → 64       1   linear      lm_head = transformer.wte
"""


def test_table():
    assert str(places("gpt2")).split("\n") == TABLE.split("\n")


def test_table_tells_what_it_cannot_name():
    assert "Only as a whole: transformer.h.*.attn.qkv_proj (how CodeGen" in str(places("codegen"))
    assert "No role known for: backbone.layers.*.mixer.in_proj" in str(places("mamba"))
    shown = " ".join(str(places("mixtral")).split())
    assert "No method can stand on: model.layers.*.mlp.gate.weight (bare parameter)" in shown
    assert "rows 0-15 of each 32" in " ".join(str(places("falcon-new")).split())
    assert repr(places("mamba")).startswith("<15 sites of MambaForCausalLM")


def test_sites_are_a_sequence():
    found = places("bert")
    assert isinstance(found[:3], Sites)
    assert len(found[:3]) == 3
    assert next(iter(found)) == found[0]
    assert hash(found) == hash(sites(model("bert")))


def test_sites_survive_copy_and_pickle():
    found = places("phi3")
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin == found
        assert str(twin) == str(found)
    some = found.select("attention.q")
    assert pickle.loads(pickle.dumps(some)).whole == found


def test_importing_places_loads_neither_torch_nor_transformers():
    code = (
        "import sys, espalier.places, espalier.survey, espalier.selectors, espalier.place_table;"
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
