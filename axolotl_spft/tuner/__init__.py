"""The PEFT method `SPFT`: importing this package registers it, for mixed models too."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from axolotl_spft.config import SpftConfig
from axolotl_spft.peft_type import SPFT
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.mixed_model import SparseMixedModel, register_in_mixed_models
from axolotl_spft.tuner.model import SpftModel
from axolotl_spft.tuner.step_unit import step_unit

if SPFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="spft", config_cls=SpftConfig, model_cls=SpftModel, prefix="spft_")
    register_in_mixed_models()

__all__ = ["SparseMixedModel", "SpftConfig", "SpftLinear", "SpftModel", "step_unit"]
