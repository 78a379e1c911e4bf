"""The model of a configuration on the meta device, of the class that Axolotl loads it as."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from axolotl_spft.errors import SpftError, first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# which Axolotl's table of models that see or hear has beside transformers': model_type -> class
_OTHERS = {"voxtral": "VoxtralForConditionalGeneration"}
_OTHER_PARTS = (
    "The parts beside the text model are counted with their weights and values; what images and sounds need in a pass "
    "is not."
)


class Model(NamedTuple):
    """A model without weights.

    Attributes:
        model: the whole of it.
        text: the part of it that a token of text goes through: all but the head, or the model itself.
        config: of that part.
        remarks: sentences on what is not as in a run.
    """

    model: nn.Module
    text: nn.Module
    config: PretrainedConfig
    remarks: tuple[str, ...]


def make_model(config: PretrainedConfig, trust_remote_code: bool = False) -> Model:
    """The model of ``config``: where it sees or hears, with all of its parts.

    Raises:
        SpftError: it is no language model, or cannot be made.
    """
    from transformers import AutoModelForCausalLM

    from axolotl_spft.checkpoint.skeleton import on_meta

    text = config.get_text_config(decoder=True)
    remarks: tuple[str, ...] = ()
    if (kind := model_class(config)) is not None:
        try:
            model = on_meta(kind, config, trust_remote_code)
        except (ImportError, ValueError) as error:
            remarks = (f"Planned is the text model alone, as the whole cannot be made here ({first_line(error)}).",)
        else:
            own = model.config.get_text_config(decoder=True)
            part = next((each for each in model.modules() if getattr(each, "config", None) is own), model)
            if part is not model:
                remarks = (_OTHER_PARTS,)
            return Model(model, part, own, remarks)
    of_code = "AutoModelForCausalLM" in (getattr(text, "auto_map", None) or {})
    if type(text) not in AutoModelForCausalLM._model_mapping and not of_code:
        raise SpftError(f"the base model's configuration, a {type(text).__name__}, is not a causal language model's")
    try:
        model = on_meta(AutoModelForCausalLM, text, trust_remote_code)
    except (ImportError, ValueError) as error:
        raise SpftError(
            f"the model of a {type(text).__name__} cannot be made here ({first_line(error)}): install what it needs, "
            "or pass `--shape` with a model of its size"
        ) from error
    return Model(model, model, text, remarks)


def model_class(config: PretrainedConfig) -> type | None:
    """The class of a model that reads more than text; None for others.

    Args:
        config: whose ``model_type`` is read.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return getattr(transformers, _OTHERS.get(config.model_type, ""), None)
