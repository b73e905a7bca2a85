"""Tiny models of many families, and what their places are, written down from their modeling code.

`MODELS` maps a name to (config class, model class, settings). `GOLDEN` gives, for the first block
of a model, every linear by role: "role path n_in n_out", for slices also "rows groups:width:a-b",
for spans "from path". Paths are inside the block; `BLOCKS` says where it stands.
"""

from __future__ import annotations

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
GQA = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
PIXELS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [8, 8],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TWO_TOWERS = {"text_config": TEXT, "vision_config": PIXELS, "projection_dim": 16}
FALCON = TEXT | {"bias": False, "pad_token_id": 0, "alibi": False}
MODERN = (
    TEXT
    | dict.fromkeys(("bos_token_id", "cls_token_id"), 1)
    | {
        "pad_token_id": 0,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
)
DEEPSEEK = TEXT | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
}
MOE = GQA | {
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "head_dim": 8,
}

MODELS: dict[str, tuple[str, str, dict]] = {
    # encoders
    "bert": ("Bert", "BertForSequenceClassification", TEXT),
    "bert-cross": (
        "Bert",
        "BertLMHeadModel",
        TEXT | {"is_decoder": True, "add_cross_attention": True},
    ),
    "roberta": ("Roberta", "RobertaForTokenClassification", TEXT | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", "XLMRobertaForMaskedLM", TEXT),
    "camembert": ("Camembert", "CamembertForSequenceClassification", TEXT),
    "distilbert": (
        "DistilBert",
        "DistilBertForQuestionAnswering",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64},
    ),
    "albert": ("Albert", "AlbertForMaskedLM", TEXT | {"embedding_size": 16}),
    "electra": ("Electra", "ElectraForPreTraining", TEXT | {"embedding_size": 16}),
    "deberta": (
        "Deberta",
        "DebertaForSequenceClassification",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta-v2": (
        "DebertaV2",
        "DebertaV2ForSequenceClassification",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False},
    ),
    "mpnet": ("MPNet", "MPNetForSequenceClassification", TEXT),
    "modernbert": ("ModernBert", "ModernBertForMaskedLM", MODERN),
    "longformer": ("Longformer", "LongformerModel", TEXT | {"attention_window": 4}),
    "mobilebert": ("MobileBert", "MobileBertModel", TEXT | {"intra_bottleneck_size": 16}),
    "funnel": (
        "Funnel",
        "FunnelModel",
        {
            "vocab_size": 64,
            "block_sizes": [1, 1],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
        },
    ),
    "xlnet": (
        "XLNet",
        "XLNetLMHeadModel",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "xlm": ("XLM", "XLMModel", {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    # decoders
    "gpt2": ("GPT2", "GPT2LMHeadModel", GPT),
    "gpt2-cross": ("GPT2", "GPT2LMHeadModel", GPT | {"add_cross_attention": True}),
    "openai-gpt": ("OpenAIGPT", "OpenAIGPTLMHeadModel", GPT),
    "gpt-neo": (
        "GPTNeo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt-neox": ("GPTNeoX", "GPTNeoXForCausalLM", TEXT),
    "gptj": ("GPTJ", "GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCode", "GPTBigCodeForCausalLM", GPT),
    "gpt-bigcode-mha": ("GPTBigCode", "GPTBigCodeForCausalLM", GPT | {"multi_query": False}),
    "codegen": ("CodeGen", "CodeGenForCausalLM", GPT | {"rotary_dim": 4}),
    "opt": (
        "OPT",
        "OPTForCausalLM",
        TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "bloom": (
        "Bloom",
        "BloomForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "falcon-mha": ("Falcon", "FalconForCausalLM", FALCON | {"multi_query": False}),
    "falcon-mqa": ("Falcon", "FalconForCausalLM", FALCON | {"multi_query": True}),
    "falcon-new": (
        "Falcon",
        "FalconForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "persimmon": ("Persimmon", "PersimmonForCausalLM", TEXT | {"pad_token_id": 0}),
    "mpt": (
        "Mpt",
        "MptForCausalLM",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
    ),
    "phi": ("Phi", "PhiForCausalLM", TEXT),
    "phi3": ("Phi3", "Phi3ForCausalLM", GQA),
    "llama": ("Llama", "LlamaForCausalLM", GQA),
    "llama-tied": ("Llama", "LlamaForCausalLM", GQA | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", "MistralForCausalLM", GQA),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", GQA | {"head_dim": 8}),
    "gemma": ("Gemma", "GemmaForCausalLM", GQA | {"head_dim": 8}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", GQA | {"head_dim": 8}),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", GQA | {"head_dim": 8}),
    "smollm3": ("SmolLM3", "SmolLM3ForCausalLM", GQA),
    "olmo": ("Olmo", "OlmoForCausalLM", GQA),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", GQA),
    "granite": ("Granite", "GraniteForCausalLM", GQA),
    "stablelm": ("StableLm", "StableLmForCausalLM", GQA),
    "starcoder2": ("Starcoder2", "Starcoder2ForCausalLM", GQA),
    "cohere": ("Cohere", "CohereForCausalLM", GQA),
    "glm": ("Glm", "GlmForCausalLM", GQA | {"head_dim": 8}),
    "mixtral": ("Mixtral", "MixtralForCausalLM", GQA | {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2Moe", "Qwen2MoeForCausalLM", MOE),
    "qwen3-moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", MOE),
    "deepseek-v3": ("DeepseekV3", "DeepseekV3ForCausalLM", DEEPSEEK),
    "mamba": ("Mamba", "MambaForCausalLM", TEXT),
    # encoder-decoders
    "t5": ("T5", "T5ForConditionalGeneration", T5),
    "t5-gated": ("T5", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5", "MT5ForConditionalGeneration", T5),
    "umt5": ("UMT5", "UMT5ForConditionalGeneration", T5),
    "bart": ("Bart", "BartForConditionalGeneration", SEQ2SEQ),
    "mbart": ("MBart", "MBartForConditionalGeneration", SEQ2SEQ),
    "pegasus": ("Pegasus", "PegasusForConditionalGeneration", SEQ2SEQ),
    "marian": (
        "Marian",
        "MarianMTModel",
        SEQ2SEQ | {"pad_token_id": 0, "decoder_start_token_id": 0},
    ),
    "blenderbot": ("Blenderbot", "BlenderbotForConditionalGeneration", SEQ2SEQ),
    "led": ("LED", "LEDForConditionalGeneration", SEQ2SEQ | {"attention_window": 4}),
    "prophetnet": (
        "ProphetNet",
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
    ),
    "whisper": (
        "Whisper",
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 8, "pad_token_id": 0},
    ),
    # vision, speech, several
    "vit": ("ViT", "ViTForImageClassification", PIXELS),
    "deit": ("DeiT", "DeiTForImageClassification", PIXELS),
    "dinov2": ("Dinov2", "Dinov2ForImageClassification", PIXELS | {"use_swiglu_ffn": True}),
    "beit": ("Beit", "BeitForImageClassification", PIXELS),
    "swin": (
        "Swin",
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 4},
    ),
    "segformer": (
        "Segformer",
        "SegformerForImageClassification",
        {
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "hidden_sizes": [16, 32],
            "sr_ratios": [2, 1],
            "num_attention_heads": [1, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    "convnext": (
        "ConvNext",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    ),
    "wav2vec2": ("Wav2Vec2", "Wav2Vec2ForCTC", SPEECH),
    "hubert": ("Hubert", "HubertModel", SPEECH),
    "clip": ("CLIP", "CLIPModel", TWO_TOWERS),
    "siglip": ("Siglip", "SiglipModel", TWO_TOWERS),
    "blip": ("Blip", "BlipForConditionalGeneration", TWO_TOWERS),
}

BLOCKS = {
    "bert": "bert.encoder.layer.0",
    "bert-cross": "bert.encoder.layer.0",
    "roberta": "roberta.encoder.layer.0",
    "distilbert": "distilbert.transformer.layer.0",
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0",
    "deberta": "deberta.encoder.layer.0",
    "deberta-v2": "deberta.encoder.layer.0",
    "mpnet": "mpnet.encoder.layer.0",
    "modernbert": "model.layers.0",
    "longformer": "encoder.layer.0",
    "mobilebert": "encoder.layer.0",
    "gpt2": "transformer.h.0",
    "gpt2-cross": "transformer.h.0",
    "gpt-neo": "transformer.h.0",
    "gpt-neox": "gpt_neox.layers.0",
    "gptj": "transformer.h.0",
    "gpt-bigcode": "transformer.h.0",
    "codegen": "transformer.h.0",
    "opt": "model.decoder.layers.0",
    "bloom": "transformer.h.0",
    "falcon-mha": "transformer.h.0",
    "falcon-mqa": "transformer.h.0",
    "falcon-new": "transformer.h.0",
    "mpt": "transformer.blocks.0",
    "phi": "model.layers.0",
    "starcoder2": "model.layers.0",
    "phi3": "model.layers.0",
    "deepseek-v3": "model.layers.0",
    "t5": "decoder.block.0",
    "t5-gated": "encoder.block.0",
    "bart": "model.decoder.layers.0",
    "led": "led.encoder.layers.0",
    "whisper": "model.decoder.layers.0",
    "vit": "vit.layers.0",
    "dinov2": "dinov2.encoder.layer.0",
    "swin": "swin.encoder.layers.1.blocks.0",
    "convnext": "convnext.encoder.stages.0.layers.0",
    "wav2vec2": "wav2vec2.encoder.layers.0",
    "clip": "vision_model.encoder.layers.0",
    "blip": "vision_model.encoder.layers.0",
    "qwen2-moe": "model.layers.0",
    "mamba": "backbone.layers.0",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), "model.layers.0"),
    **dict.fromkeys(("gemma3", "smollm3", "olmo", "olmo2", "granite"), "model.layers.0"),
    **dict.fromkeys(("stablelm", "cohere"), "model.layers.0"),
}

_BERT = """
attention.q  attention.self.query    32 32
attention.k  attention.self.key      32 32
attention.v  attention.self.value    32 32
attention.o  attention.output.dense  32 32
attention    attention.output.dense  32 32  from attention.self.query
ffn.in       intermediate.dense      32 48
ffn.out      output.dense            48 32
ffn          output.dense            32 32  from intermediate.dense
"""
_LLAMA = """
attention.q  self_attn.q_proj  32 32
attention.k  self_attn.k_proj  32 16
attention.v  self_attn.v_proj  32 16
attention.o  self_attn.o_proj  32 32
attention    self_attn.o_proj  32 32  from self_attn.q_proj
ffn.gate     mlp.gate_proj     32 48
ffn.in       mlp.up_proj       32 48
ffn.out      mlp.down_proj     48 32
ffn          mlp.down_proj     32 32  from mlp.up_proj
"""
_SELF_BART = """
attention.q  self_attn.q_proj    32 32
attention.k  self_attn.k_proj    32 32
attention.v  self_attn.v_proj    32 32
attention.o  self_attn.out_proj  32 32
attention    self_attn.out_proj  32 32  from self_attn.q_proj
"""
_FFN_BART = """
ffn.in   fc1  32 48
ffn.out  fc2  48 32
ffn      fc2  32 32  from fc1
"""
_CROSS_BART = _SELF_BART.replace("attention", "cross").replace("self_attn", "encoder_attn")
_FFN_MLP = _FFN_BART.replace("fc", "mlp.fc")
_VIT = """
attention.q  attention.q_proj  32 32
attention.k  attention.k_proj  32 32
attention.v  attention.v_proj  32 32
attention.o  attention.o_proj  32 32
attention    attention.o_proj  32 32  from attention.q_proj
"""
_GPT2 = """
attention.qkv  attn.c_attn  32 96
attention.q    attn.c_attn  32 32  rows 1:96:0-32
attention.k    attn.c_attn  32 32  rows 1:96:32-64
attention.v    attn.c_attn  32 32  rows 1:96:64-96
attention.o    attn.c_proj  32 32
attention      attn.c_proj  32 32  from attn.c_attn
ffn.in         mlp.c_fc     32 128
ffn.out        mlp.c_proj   128 32
ffn            mlp.c_proj   32 32  from mlp.c_fc
"""
_BLOOM = """
attention.qkv  self_attention.query_key_value  32 96
attention.q    self_attention.query_key_value  32 32  rows 4:24:0-8
attention.k    self_attention.query_key_value  32 32  rows 4:24:8-16
attention.v    self_attention.query_key_value  32 32  rows 4:24:16-24
attention.o    self_attention.dense            32 32
attention      self_attention.dense            32 32  from self_attention.query_key_value
ffn.in         mlp.dense_h_to_4h               32 128
ffn.out        mlp.dense_4h_to_h               128 32
ffn            mlp.dense_4h_to_h               32 32  from mlp.dense_h_to_4h
"""
_T5_SELF = """
attention.q  layer.0.SelfAttention.q  32 32
attention.k  layer.0.SelfAttention.k  32 32
attention.v  layer.0.SelfAttention.v  32 32
attention.o  layer.0.SelfAttention.o  32 32
attention    layer.0.SelfAttention.o  32 32  from layer.0.SelfAttention.q
"""

GOLDEN = {
    "bert": _BERT,
    "roberta": _BERT,
    "bert-cross": _BERT
    + """
cross.q  crossattention.self.query    32 32
cross.k  crossattention.self.key      32 32
cross.v  crossattention.self.value    32 32
cross.o  crossattention.output.dense  32 32
cross    crossattention.output.dense  32 32  from crossattention.self.query
""",
    "distilbert": """
attention.q  attention.q_lin    32 32
attention.k  attention.k_lin    32 32
attention.v  attention.v_lin    32 32
attention.o  attention.out_lin  32 32
attention    attention.out_lin  32 32  from attention.q_lin
ffn.in       ffn.lin1           32 48
ffn.out      ffn.lin2           48 32
ffn          ffn.lin2           32 32  from ffn.lin1
""",
    "albert": """
attention.q  attention.query  32 32
attention.k  attention.key    32 32
attention.v  attention.value  32 32
attention.o  attention.dense  32 32
attention    attention.dense  32 32  from attention.query
ffn.in       ffn              32 48
ffn.out      ffn_output       48 32
ffn          ffn_output       32 32  from ffn
""",
    "deberta": """
attention.qkv    attention.self.in_proj     32 96
attention.q      attention.self.in_proj     32 32  rows 4:24:0-8
attention.k      attention.self.in_proj     32 32  rows 4:24:8-16
attention.v      attention.self.in_proj     32 32  rows 4:24:16-24
attention.extra  attention.self.pos_proj    32 32
attention.extra  attention.self.pos_q_proj  32 32
attention.o      attention.output.dense     32 32
attention        attention.output.dense     32 32  from attention.self.in_proj
ffn.in           intermediate.dense         32 48
ffn.out          output.dense               48 32
ffn              output.dense               32 32  from intermediate.dense
""",
    "deberta-v2": """
attention.q      attention.self.query_proj      32 32
attention.k      attention.self.key_proj        32 32
attention.v      attention.self.value_proj      32 32
attention.extra  attention.self.pos_key_proj    32 32
attention.extra  attention.self.pos_query_proj  32 32
attention.o      attention.output.dense         32 32
attention        attention.output.dense         32 32  from attention.self.query_proj
ffn.in           intermediate.dense             32 48
ffn.out          output.dense                   48 32
ffn              output.dense                   32 32  from intermediate.dense
""",
    "mpnet": """
attention.q  attention.attn.q    32 32
attention.k  attention.attn.k    32 32
attention.v  attention.attn.v    32 32
attention.o  attention.attn.o    32 32
attention    attention.attn.o    32 32  from attention.attn.q
ffn.in       intermediate.dense  32 48
ffn.out      output.dense        48 32
ffn          output.dense        32 32  from intermediate.dense
""",
    "modernbert": """
attention.qkv  attn.Wqkv  32 96
attention.q    attn.Wqkv  32 32  rows 1:96:0-32
attention.k    attn.Wqkv  32 32  rows 1:96:32-64
attention.v    attn.Wqkv  32 32  rows 1:96:64-96
attention.o    attn.Wo    32 32
attention      attn.Wo    32 32  from attn.Wqkv
ffn.gate_in    mlp.Wi     32 96
ffn.gate       mlp.Wi     32 48  rows 1:96:0-48
ffn.in         mlp.Wi     32 48  rows 1:96:48-96
ffn.out        mlp.Wo     48 32
ffn            mlp.Wo     32 32  from mlp.Wi
""",
    "longformer": _BERT
    + """
attention.extra  attention.self.query_global  32 32
attention.extra  attention.self.key_global    32 32
attention.extra  attention.self.value_global  32 32
""",
    # Widths inside the bottleneck are 16; its value reads the full 32.
    "mobilebert": """
attention.q  attention.self.query        16 16
attention.k  attention.self.key          16 16
attention.v  attention.self.value        32 16
attention.o  attention.output.dense      16 16
attention    attention.output.dense      16 16  from attention.self.query
ffn.in       intermediate.dense          16 48
ffn.out      output.dense                48 16
ffn          output.dense                16 16  from intermediate.dense
other        output.bottleneck.dense     16 32
other        bottleneck.input.dense      32 16
other        bottleneck.attention.dense  32 16
ffn.in       ffn.0.intermediate.dense    16 48
ffn.out      ffn.0.output.dense          48 16
ffn          ffn.0.output.dense          16 16  from ffn.0.intermediate.dense
ffn.in       ffn.1.intermediate.dense    16 48
ffn.out      ffn.1.output.dense          48 16
ffn          ffn.1.output.dense          16 16  from ffn.1.intermediate.dense
ffn.in       ffn.2.intermediate.dense    16 48
ffn.out      ffn.2.output.dense          48 16
ffn          ffn.2.output.dense          16 16  from ffn.2.intermediate.dense
""",
    "gpt2": _GPT2,
    "gpt2-cross": _GPT2
    + """
cross.kv  crossattention.c_attn  32 64
cross.k   crossattention.c_attn  32 32  rows 1:64:0-32
cross.v   crossattention.c_attn  32 32  rows 1:64:32-64
cross.q   crossattention.q_attn  32 32
cross.o   crossattention.c_proj  32 32
cross     crossattention.c_proj  32 32  from crossattention.q_attn
""",
    "gpt-neo": """
attention.q  attn.attention.q_proj    32 32
attention.k  attn.attention.k_proj    32 32
attention.v  attn.attention.v_proj    32 32
attention.o  attn.attention.out_proj  32 32
attention    attn.attention.out_proj  32 32  from attn.attention.q_proj
ffn.in       mlp.c_fc                 32 48
ffn.out      mlp.c_proj               48 32
ffn          mlp.c_proj               32 32  from mlp.c_fc
""",
    "gpt-neox": _BLOOM.replace("self_attention", "attention").replace("128", "48"),
    "gptj": """
attention.q  attn.q_proj    32 32
attention.k  attn.k_proj    32 32
attention.v  attn.v_proj    32 32
attention.o  attn.out_proj  32 32
attention    attn.out_proj  32 32  from attn.q_proj
ffn.in       mlp.fc_in      32 128
ffn.out      mlp.fc_out     128 32
ffn          mlp.fc_out     32 32  from mlp.fc_in
""",
    "gpt-bigcode": """
attention.qkv  attn.c_attn  32 48
attention.q    attn.c_attn  32 32  rows 1:48:0-32
attention.k    attn.c_attn  32 8   rows 1:48:32-40
attention.v    attn.c_attn  32 8   rows 1:48:40-48
attention.o    attn.c_proj  32 32
attention      attn.c_proj  32 32  from attn.c_attn
ffn.in         mlp.c_fc     32 128
ffn.out        mlp.c_proj   128 32
ffn            mlp.c_proj   32 32  from mlp.c_fc
""",
    "codegen": """
attention.qkv  attn.qkv_proj  32 96
attention.o    attn.out_proj  32 32
attention      attn.out_proj  32 32  from attn.qkv_proj
ffn.in         mlp.fc_in      32 128
ffn.out        mlp.fc_out     128 32
ffn            mlp.fc_out     32 32  from mlp.fc_in
""",
    "opt": _SELF_BART + _FFN_BART,
    "bloom": _BLOOM,
    "falcon-mha": _BLOOM,
    # One key and one value for all heads: 4 × 8 queries, then 8 and 8.
    "falcon-mqa": """
attention.qkv  self_attention.query_key_value  32 48
attention.q    self_attention.query_key_value  32 32  rows 1:48:0-32
attention.k    self_attention.query_key_value  32 8   rows 1:48:32-40
attention.v    self_attention.query_key_value  32 8   rows 1:48:40-48
attention.o    self_attention.dense            32 32
attention      self_attention.dense            32 32  from self_attention.query_key_value
ffn.in         mlp.dense_h_to_4h               32 128
ffn.out        mlp.dense_4h_to_h               128 32
ffn            mlp.dense_4h_to_h               32 32  from mlp.dense_h_to_4h
""",
    # Two groups of two queries, one key, one value, each 8 wide.
    "falcon-new": """
attention.qkv  self_attention.query_key_value  32 64
attention.q    self_attention.query_key_value  32 32  rows 2:32:0-16
attention.k    self_attention.query_key_value  32 16  rows 2:32:16-24
attention.v    self_attention.query_key_value  32 16  rows 2:32:24-32
attention.o    self_attention.dense            32 32
attention      self_attention.dense            32 32  from self_attention.query_key_value
ffn.in         mlp.dense_h_to_4h               32 128
ffn.out        mlp.dense_4h_to_h               128 32
ffn            mlp.dense_4h_to_h               32 32  from mlp.dense_h_to_4h
""",
    "mpt": """
attention.qkv  attn.Wqkv      32 96
attention.q    attn.Wqkv      32 32  rows 1:96:0-32
attention.k    attn.Wqkv      32 32  rows 1:96:32-64
attention.v    attn.Wqkv      32 32  rows 1:96:64-96
attention.o    attn.out_proj  32 32
attention      attn.out_proj  32 32  from attn.Wqkv
ffn.in         ffn.up_proj    32 128
ffn.out        ffn.down_proj  128 32
ffn            ffn.down_proj  32 32  from ffn.up_proj
""",
    "phi": _SELF_BART.replace("out_proj", "dense") + _FFN_MLP,
    "phi3": """
attention.qkv  self_attn.qkv_proj  32 64
attention.q    self_attn.qkv_proj  32 32  rows 1:64:0-32
attention.k    self_attn.qkv_proj  32 16  rows 1:64:32-48
attention.v    self_attn.qkv_proj  32 16  rows 1:64:48-64
attention.o    self_attn.o_proj    32 32
attention      self_attn.o_proj    32 32  from self_attn.qkv_proj
ffn.gate_in    mlp.gate_up_proj    32 96
ffn.gate       mlp.gate_up_proj    32 48  rows 1:96:0-48
ffn.in         mlp.gate_up_proj    32 48  rows 1:96:48-96
ffn.out        mlp.down_proj       48 32
ffn            mlp.down_proj       32 32  from mlp.gate_up_proj
""",
    "starcoder2": """
attention.q  self_attn.q_proj  32 32
attention.k  self_attn.k_proj  32 16
attention.v  self_attn.v_proj  32 16
attention.o  self_attn.o_proj  32 32
attention    self_attn.o_proj  32 32  from self_attn.q_proj
ffn.in       mlp.c_fc          32 48
ffn.out      mlp.c_proj        48 32
ffn          mlp.c_proj        32 32  from mlp.c_fc
""",
    # q: 4 heads × (8 + 4); kv_b: 4 heads × (8 position-free key + 6 value); the change of the
    # attention span reads what the latent down-projection reads.
    "deepseek-v3": """
attention.extra  self_attn.q_a_proj            32 12
attention.q      self_attn.q_b_proj            12 48
attention.extra  self_attn.kv_a_proj_with_mqa  32 12
attention.kv     self_attn.kv_b_proj           8 56
attention.k      self_attn.kv_b_proj           8 32  rows 4:14:0-8
attention.v      self_attn.kv_b_proj           8 24  rows 4:14:8-14
attention.o      self_attn.o_proj              24 32
attention        self_attn.o_proj              32 32  from self_attn.q_a_proj
ffn.gate         mlp.gate_proj                 32 48
ffn.in           mlp.up_proj                   32 48
ffn.out          mlp.down_proj                 48 32
ffn              mlp.down_proj                 32 32  from mlp.up_proj
""",
    "t5": _T5_SELF
    + _T5_SELF.replace("attention", "cross").replace("0.SelfA", "1.EncDecA")
    + """
ffn.in   layer.2.DenseReluDense.wi  32 48
ffn.out  layer.2.DenseReluDense.wo  48 32
ffn      layer.2.DenseReluDense.wo  32 32  from layer.2.DenseReluDense.wi
""",
    "t5-gated": _T5_SELF
    + """
ffn.gate  layer.1.DenseReluDense.wi_0  32 48
ffn.in    layer.1.DenseReluDense.wi_1  32 48
ffn.out   layer.1.DenseReluDense.wo    48 32
ffn       layer.1.DenseReluDense.wo    32 32  from layer.1.DenseReluDense.wi_1
""",
    "bart": _SELF_BART + _CROSS_BART + _FFN_BART,
    "whisper": _SELF_BART + _CROSS_BART + _FFN_BART,
    "led": """
attention.q      self_attn.longformer_self_attn.query         32 32
attention.k      self_attn.longformer_self_attn.key           32 32
attention.v      self_attn.longformer_self_attn.value         32 32
attention.extra  self_attn.longformer_self_attn.query_global  32 32
attention.extra  self_attn.longformer_self_attn.key_global    32 32
attention.extra  self_attn.longformer_self_attn.value_global  32 32
attention.o      self_attn.output                             32 32
attention        self_attn.output                             32 32  from {query}
""".format(query="self_attn.longformer_self_attn.query")
    + _FFN_BART,
    "vit": _VIT + _FFN_MLP,
    # SwiGLU: 2/3 of 4 × 32, rounded up to a multiple of 8.
    "dinov2": _VIT
    + """
ffn.gate  mlp.gate_proj  32 88
ffn.in    mlp.up_proj    32 88
ffn.out   mlp.down_proj  88 32
ffn       mlp.down_proj  32 32  from mlp.up_proj
""",
    "swin": _VIT + _FFN_MLP.replace("48", "128"),
    "convnext": """
ffn.in   pwconv1  8 32
ffn.out  pwconv2  32 8
ffn      pwconv2  8 8  from pwconv1
""",
    "wav2vec2": _SELF_BART.replace("self_attn", "attention")
    + """
ffn.in   feed_forward.intermediate_dense  32 48
ffn.out  feed_forward.output_dense        48 32
ffn      feed_forward.output_dense        32 32  from feed_forward.intermediate_dense
""",
    "clip": _SELF_BART + _FFN_MLP,
    "blip": """
attention.qkv  self_attn.qkv         32 96
attention.q    self_attn.qkv         32 32  rows 1:96:0-32
attention.k    self_attn.qkv         32 32  rows 1:96:32-64
attention.v    self_attn.qkv         32 32  rows 1:96:64-96
attention.o    self_attn.projection  32 32
attention      self_attn.projection  32 32  from self_attn.qkv
"""
    + _FFN_MLP,
    # The routed experts are stacked parameters, so only the shared one has places.
    "qwen2-moe": _LLAMA.replace("mlp.", "mlp.shared_expert.").replace("48", "24")
    + "router  mlp.shared_expert_gate  32 1",
    "mamba": """
other  mixer.in_proj   32 96
other  mixer.x_proj    48 34
other  mixer.dt_proj   2 48
other  mixer.out_proj  48 32
""",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
    **dict.fromkeys(
        ("gemma3", "smollm3", "olmo", "olmo2", "granite", "stablelm", "cohere"), _LLAMA
    ),
}
