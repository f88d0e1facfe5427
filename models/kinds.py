"""What kind of model a transformers configuration describes, and the class that holds its weights."""

from typing import Any

from qcompile.passes.errors import UserError

DECODER, ENCODER, VISION, SPEECH, DUAL, SEQ2SEQ = "decoder", "encoder", "vision", "speech", "dual", "seq2seq"


def model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from, else the one that AutoModel chooses; None where there is none."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        return None


def kind_of(config: Any) -> str:
    """The kind of a model; UserError, with the reason, for one that is of none.

    decoder: predicts the next token. encoder: text to hidden states. vision: images. speech: audio. dual: a text and
    an image tower, as CLIP. seq2seq: an encoder and a decoder.
    """
    made = model_class(config)
    takes = getattr(made, "main_input_name", "input_ids")
    towers = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if towers and hasattr(made, "get_text_features") and hasattr(made, "get_image_features"):
        return DUAL
    if towers:
        raise UserError(
            f"{config.model_type} joins a text model with {' and '.join(n.removesuffix('_config') for n in towers)}: "
            "such models cannot be exported whole; export the text or vision model's own folder"
        )
    generates = bool(getattr(made, "can_generate", bool)())
    if getattr(config, "is_encoder_decoder", False) and (takes != "pixel_values" or generates):
        if takes not in ("input_ids", "input_features") or not hasattr(made, "get_encoder"):
            raise UserError(f"{config.model_type} models (an encoder of {takes} and a decoder) cannot be exported")
        return SEQ2SEQ
    if takes in ("pixel_values", "input_values", "input_features"):
        return VISION if takes == "pixel_values" else SPEECH
    if takes != "input_ids":
        raise UserError(
            f"{config.model_type} models take {takes}: text, images, audio and pairs of them can be exported"
        )
    return DECODER if _predicts_tokens(config) else ENCODER


def _predicts_tokens(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if architectures := getattr(config, "architectures", None):
        return bool(architectures[0].endswith(("ForCausalLM", "LMHeadModel")))
    causal, masked = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and config.model_type not in masked
