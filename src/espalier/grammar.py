"""What names in models mean: strings in, roles out; the only file that holds model names.

A role is read from the path inside one repeated block ("attention.self.query", "mlp.fc1"): the
parent names say whether it stands in attention, cross attention or the feed-forward part, the last
name says what it computes. Inside attention, whatever is not q, k, v or o is `attention.extra`
(latent down-projections, position projections, global twins).
How a fused host lays out its rows is never guessed: `FUSED` lists the classes whose code was read.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache

HOST_ROLES = (
    *("attention." + part for part in ("q", "k", "v", "qkv", "kv", "o", "extra")),
    *("cross." + part for part in ("q", "k", "v", "qkv", "kv", "o", "extra")),
    *("ffn." + part for part in ("in", "gate", "gate_in", "out")),
    *("router", "norm", "embedding", "embedding.extra", "pooler", "head", "conv", "other"),
)
SPANS = ("attention", "cross", "ffn", "block")
ROLES = (*SPANS, *HOST_ROLES)

# Which fused role holds which slices, in the order of their rows.
SLICES = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_in": ("gate", "in")}

CROSS = re.compile(r"cross|encdec|encoder_attn|encoder_decoder_att|^attn2$|^multihead_attn$", re.I)
ATTENTION = re.compile(r"att(ention|n)|(^|_)att$", re.I)
FFN = re.compile(
    r"^(mlp|ffn?s?|ff_context|ffw\w*|net|feed_?forward\w*|densereludense|\w*experts?|\w*mlp|\w*moe)$",
    re.I,
)
# Linears under these are no part of attention or feed-forward: adaptive norms, MobileBERT's
# bottlenecks, adapters that a model brings along.
_APART = re.compile(r"norm|bottleneck|adapter_list", re.I)

_AFTER = r"(?:_?(?:proj|lin|linear|head|attn|b_proj|projection|layer))?"
_BEFORE = r"(?:to_|linear_|project_|projection_|w_?)?"


def _leaf(stems: str) -> re.Pattern[str]:
    return re.compile(f"{_BEFORE}(?:{stems}){_AFTER}", re.I)


_ATTENTION_LEAVES = (
    ("qkv", re.compile(r"c_attn|w_pack|in_proj|att_proj", re.I)),
    ("qkv", _leaf("qkv|query_key_value|q_k_v")),
    ("kv", _leaf("kv|key_value")),
    ("q", _leaf("q|query|queries")),
    ("k", _leaf("k|key|keys")),
    ("v", _leaf("v|value|values")),
    (
        "o",
        re.compile(
            r"(?:to_)?o(?:ut|utput)?(?:_(?:proj|lin|linear|projection))?|to_out\.0|c_proj|dense|"
            r"(?:output|out)\.(?:dense|proj)|proj|projection|wo|post(?:_proj)?|linear_out|final_linear|"
            r"attention_out",
            re.I,
        ),
    ),
)
FAMILIES = {"attention": ATTENTION, "cross": CROSS, "ffn": FFN}
# Names that may stand between an attention and its projections. Any other name is a side structure
# (an indexer, a compressor, a second modality), whose own q and k are not the attention's.
_BETWEEN = re.compile(r"att(ention|n)|^(att|self|out(put)?(_projection)?|qkv_proj|\d+)$", re.I)
_FFN_LEAVES = (
    ("gate_in", re.compile(r"gate_up_proj|Wi|w12|weights_in|input_linear|gate_up")),
    ("gate", re.compile(r"gate_proj|wi_0|gate_linear|linear_gate|w1|w_in\.w_0")),
    (
        "in",
        re.compile(
            r"fc_?1|lin_?1|linear_?1|linear_fc1|layer_1|wi|wi_1|up_proj|c_fc|fc_in|w3|linear_in|"
            r"(?:intermediate\.)?dense_?1|dense_h_to_4h|intermediate(?:\.dense|_dense)?|0|0\.proj|"
            r"ffw_layer_1|pwconv1|dense_in|dense\.dense|fc1\.proj|w_in\.w_1|in_proj|"
            r"linear_3"
        ),
    ),
    (
        "out",
        re.compile(
            r"fc_?2|lin_?2|linear_?2|linear_fc2|layer_2|wo|Wo|w2|down_proj|c_proj|fc_out|[1-9]|"
            r"dense_?2|dense_4h_to_h|output(?:\.dense|_dense|_linear)?|ffw_layer_2|pwconv2|"
            r"linear_out|dense_out|w_out|out_proj|"
            r"out_projection"
        ),
    ),
)
# With no attention or feed-forward module around them.
_BARE_FFN = (
    ("gate_in", re.compile(r"gate_up_proj")),
    ("gate", re.compile(r"gate_proj")),
    (
        "in",
        re.compile(
            r"fc1|linear_?1|lin1|pwconv1|ffn|intermediate(_query)?(\.|_)dense|up_proj|proj_mlp"
        ),
    ),
    (
        "out",
        re.compile(r"fc2|linear_?2|lin2|pwconv2|ffn_output|output(_query)?(\.|_)dense|down_proj"),
    ),
)
_BARE_ATTENTION = tuple((part, re.compile(f"{part}_proj")) for part in ("q", "k", "v", "o", "qkv"))
_ROUTER = re.compile(r"(^|\.)(gate|router|\w*router\w*|shared_expert_gate)(\.\w+)?$")
_HEAD = re.compile(
    r"(^|\.)(lm_head|cls|classifier|classification_head|score|scores?_head|qa_outputs|head|heads|"
    r"\w+_head|vocab_projector|vocab_transform|proj_out|lm_loss|logits_proj|predictions|"
    r"\w+_predictions|(?:visual|vision|text|audio)_projection|ctc_proj)(\.|$)"
)
_TOKENS = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings?|wte|tok_embeddings|tokens?_embed(ding|dings)?|embed_in|"
    r"input_embeds_layer|shared|w|emb)$|^(\w+\.)?embeddings?$"
)
# Tables outside the stacks of an encoder-decoder, only there for the stacks' own to be tied to.
STORES = ("shared", "word_embeddings")
_STACKS = (
    ("vision", re.compile(r"(^|[._])(vision|visual|image|pixel|video)([._]|$)")),
    ("audio", re.compile(r"(^|[._])(audio|speech|acoustic)([._]|$)")),
    ("text", re.compile(r"(^|[._])(text|language)([._]|$)")),
    *((name, re.compile(rf"^{name}_blocks?(\.|$)")) for name in ("down", "mid", "up")),
)
# Lists in a diffusion model whose members hold blocks or single layers and are none themselves.
STAGES = re.compile(r"^(down_blocks|up_blocks|resnets)$")
# Lists of blocks, also where they stand inside a stage.
LAYERS = re.compile(r"^(\w*layers?|\w*blocks?|\d+|h)$")
_CODER = re.compile(r"(encoder|decoder)")


def alone(path: str, siblings: Container[str]) -> str:
    """The path with SD 3.5's `attn2` named otherwise: without an `attn1` it crosses to nothing."""
    second = path.startswith("attn2.") and "attn1" not in siblings
    return "attn_2." + path.removeprefix("attn2.") if second else path


@lru_cache(maxsize=8192)
def block_role(path: str) -> tuple[str, str]:
    """The role of a linear at `path` inside a block, and the part of the block it belongs to."""
    names = path.split(".")
    if any(_APART.search(name) for name in names[:-1]):
        return "other", ""
    for i, name in enumerate(names[:-1]):
        if ATTENTION.search(name) or CROSS.search(name):
            family = "cross" if any(CROSS.search(n) for n in names[:-1]) else "attention"
            part = _attention_part(names[i + 1 :])
            if (family, part, names[-1]) == ("cross", "qkv", "c_attn"):
                part = "kv"  # GPT-2's cross attention has its own q_attn
            return f"{family}.{part}", ".".join(names[: i + 1])
    if _ROUTER.search(path):
        return "router", ""
    if any(FFN.match(name) for name in names[:-1]):
        part, start = _tail(_FFN_LEAVES, names)
        return (f"ffn.{part}" if part else "other"), ".".join(names[:start])
    for family, table in (("ffn", _BARE_FFN), ("attention", _BARE_ATTENTION)):
        part, start = _tail(table, names)
        if part:
            return f"{family}.{part}", ".".join(names[:start])
    return "other", ""


def _attention_part(names: list[str]) -> str:
    part, start = _tail(_ATTENTION_LEAVES, names)
    return part if part and all(_BETWEEN.search(name) for name in names[:start]) else "extra"


def _tail(table: tuple[tuple[str, re.Pattern[str]], ...], names: list[str]) -> tuple[str, int]:
    """The part that the longest known ending of the path names, and where that ending begins."""
    if len(names) > 1 and names[-1] == "linear":
        names = names[:-1]  # Gemma 4 wraps each linear once more
    for start in range(len(names)):
        ending = ".".join(names[start:])
        for part, pattern in table:
            if pattern.fullmatch(ending):
                return part, start
    return "", 0


def of_attention(path: str) -> bool:
    """Whether the module that holds this one is an attention."""
    parent = path.rpartition(".")[0].rpartition(".")[2]
    return bool(ATTENTION.search(parent) or CROSS.search(parent))


@lru_cache(maxsize=1024)
def outer_role(path: str) -> str:
    """The role of a linear at `path` outside every block."""
    if "pooler" in path:
        return "pooler"
    return "head" if _HEAD.search(path) else "other"


@lru_cache(maxsize=1024)
def embedding_role(path: str) -> str:
    """`embedding` for tables of words, `embedding.extra` for positions, types and biases."""
    return "embedding" if _TOKENS.search(path) else "embedding.extra"


@lru_cache(maxsize=8192)
def stack_of(path: str) -> str:
    """The stack a path names, or "" where it names none."""
    for name, pattern in _STACKS:
        if pattern.search(path):
            return name
    found = _CODER.search(path)
    return found.group(1) if found else ""


@lru_cache(maxsize=1024)
def names_a_part(name: str) -> bool:
    """Whether a list's own name says what its members do ("attentions", "ffns")."""
    if LAYERS.match(name):
        return False  # BridgeTower's cross_modal_text_layers are whole blocks
    return bool(ATTENTION.search(name) or CROSS.search(name) or FFN.match(name))


def is_head(path: str) -> bool:
    """Whether a path lies in a task head."""
    return bool(_HEAD.search(path))


# The one table of exceptions: classes of transformers whose forward was read.
#   split    rows are [q | k | v] (or [k | v], [gate | in]), each contiguous
#   grouped  rows are per key-value head: its queries, its key, its value (NeoX, BLOOM: one each)
#   swapped  rows are [in | gate]: the half that goes through the activation comes second
# Not listed on purpose: CodeGen (q, v, k in four shards), Zamba 2 (adapters beside the host).
_SPLIT = (
    "GPT2 ImageGPT DecisionTransformerGPT2 Mpt Dbrx ModernBert Phi3 Phi4Multimodal Blip Blip2 "
    "InstructBlip InstructBlipVideo VitDet SegGpt Mgpstr TimesformerSelf Sam2MultiScale "
    "HieraMaskUnit Florence2VisionChannel Florence2VisionWindow LayoutLMv2Self SamVision "
    "SamHQVision GotOcr2Vision SLANeXtVision DeepseekOcr2SamVision UnlimitedOcrSamVision "
    "PPFormulaNetVision PPOCRV5MobileRec PPOCRV5ServerRec PPOCRV6SmallRec Vision Qwen2_5_VLVision "
    "Qwen3VLVision Qwen3VLMoeVision Qwen3_5Vision Qwen3_5MoeVision Qwen3OmniMoeVision Glm4vVision "
    "Glm4vMoeVision GlmOcrVision GlmImageVision Glm5NextVision Ernie4_5_VLMoeVision "
    "CohereCompassVision Dots3NoteVision BarkSelf JetMoe Exaone4_5_Vision "
    "Qwen4ExpVision GraniteSpeechConformer GraniteSpeechPlusConformer"
)
_SPLIT_MLP = (
    "Phi3MLP Phi4MultimodalMLP GlmMLP Glm4MLP Glm4vTextMLP GlmOcrTextMLP GlmImageTextMLP DiaMLP "
    "EsmFold2SwiGLU Dots3NoteAudioMLP MiniMaxM3VLDenseMLP ModernBertMLP ModernBertDecoderMLP "
    "GraniteMoeSharedMLP GraniteMoeHybridMLP GraniteMoeSWAMLP "
    "MoshiGatingMLP KyutaiSpeechToTextGatingMLP"
)
_SWAPPED = "MoonshineDecoderMLP Phi4MultimodalAudioMLP ClvpGatedLinearUnit"
_GROUPED = "GPTNeoX GPTNeoXJapanese Bloom Persimmon Falcon GPTBigCode MiniMaxLightning"
FUSED = {
    **{name + "Attention": "split" for name in _SPLIT.split()},
    **dict.fromkeys(_SPLIT_MLP.split(), "split"),
    **dict.fromkeys(_SWAPPED.split(), "swapped"),
    **{name + "Attention": "grouped" for name in _GROUPED.split()},
    "Attention": "split",  # OpenAI's first GPT
    "DisentangledSelfAttention": "grouped",  # DeBERTa's in_proj
    **dict.fromkeys(("diffusers.GEGLU", "diffusers.SwiGLU"), "swapped"),
    "diffusers.Flux2FeedForward": "split",
}
# Their key-value count says less than their class: one key and value for every query head.
ONE_EACH = {"GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention",
            "MiniMaxLightningAttention", "DisentangledSelfAttention"}  # fmt: skip
# Decoders of one stack that neither their paths nor an `is_causal` attribute give away.
CAUSAL_CLASS = re.compile(r"CausalLM|LMHead|GPT|Bloom|Mpt|CodeGen|Mamba|Rwkv|XGLM|CTRL|Zamba|xLSTM")
