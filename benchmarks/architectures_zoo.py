"""Small random models of transformers' architectures, by name: two layers, width 64. No weights are downloaded."""

from dataclasses import dataclass
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_LLM: dict[str, Any] = _TEXT | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_ALBERT = {"embedding_size": 32, "hidden_size": 64}
_GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 256,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
}
_T5 = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_WHISPER = _SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 64} | {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SEGFORMER = {
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "decoder_hidden_size": 64,
}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
_CLIP_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_CLIP = {
    "text_config": _CLIP_TOWER
    | {"vocab_size": 256, "max_position_embeddings": 32, "eos_token_id": 2, "projection_dim": 64},
    "vision_config": _CLIP_TOWER | {"image_size": 32, "patch_size": 8, "projection_dim": 64},
    "projection_dim": 64,
}
_MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
    "num_attention_heads": 4,
}
_DETR_BACKBONE = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers and the settings of its configuration."""

    model: str
    config: str
    settings: dict[str, Any]

    def make(self) -> Any:
        """The model with seeded random weights, large enough that layers matter."""
        import torch
        import transformers

        torch.manual_seed(0)
        settings = dict(self.settings)
        if self.config == "DetrConfig":
            backbone = transformers.ResNetConfig(**_DETR_BACKBONE, out_features=["stage2"])
            settings |= {"use_timm_backbone": False, "backbone_config": backbone, "backbone": None}
        config = getattr(transformers, self.config)(**settings)
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, (parameter[0].numel() / 2) ** -0.5)  # fan-in, as for networks of Relu
        return model


_ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("bert", "BertModel", "BertConfig", _TEXT),
    ("roberta", "RobertaModel", "RobertaConfig", _TEXT),
    (
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 256, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    ),
    ("albert", "AlbertModel", "AlbertConfig", _TEXT | _ALBERT),
    ("electra", "ElectraModel", "ElectraConfig", _TEXT | {"embedding_size": 32}),
    (
        "deberta-v2",
        "DebertaV2Model",
        "DebertaV2Config",
        _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    ("mpnet", "MPNetModel", "MPNetConfig", _TEXT),
    (
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        _TEXT | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    (
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    ("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    ("bloom", "BloomForCausalLM", "BloomConfig", {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    (
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    ("llama", "LlamaForCausalLM", "LlamaConfig", _LLM),
    ("mistral", "MistralForCausalLM", "MistralConfig", _LLM),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _LLM),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _LLM),
    ("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _LLM | {"sliding_window": 8}),
    ("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _LLM | {"sliding_window": 8}),
    ("phi3", "Phi3ForCausalLM", "Phi3Config", {key: value for key, value in _LLM.items() if key != "head_dim"}),
    ("mixtral", "MixtralForCausalLM", "MixtralConfig", _LLM | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _LLM | _MOE),
    (
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 256, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
    ),
    ("t5", "T5ForConditionalGeneration", "T5Config", _T5),
    ("bart", "BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    ("marian", "MarianMTModel", "MarianConfig", _SEQ2SEQ | {"pad_token_id": 0, "decoder_start_token_id": 0}),
    ("whisper", "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    ("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH),
    ("hubert", "HubertModel", "HubertConfig", _SPEECH),
    (
        "ast",
        "ASTModel",
        "ASTConfig",
        {**_CLIP_TOWER, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 64, "num_mel_bins": 32},
    ),
    ("vit", "ViTForImageClassification", "ViTConfig", _IMAGE),
    ("dinov2", "Dinov2Model", "Dinov2Config", _IMAGE),
    ("swin", "SwinForImageClassification", "SwinConfig", _SWIN),
    ("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", _SEGFORMER | {"image_size": 64}),
    (
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "image_size": 64},
    ),
    ("resnet", "ResNetForImageClassification", "ResNetConfig", _RESNET | {"image_size": 64}),
    ("mobilevit", "MobileViTForImageClassification", "MobileViTConfig", _MOBILEVIT),
    (
        "detr",
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_queries": 10,
            "image_size": 64,
        },
    ),
    ("clip", "CLIPModel", "CLIPConfig", _CLIP),
    ("siglip", "SiglipModel", "SiglipConfig", {key: value for key, value in _CLIP.items() if key != "projection_dim"}),
]

ARCHITECTURES: dict[str, Architecture] = {row[0]: Architecture(*row[1:]) for row in _ROWS}
