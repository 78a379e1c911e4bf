"""A loss of Liger's that a trainer asks for beside a targeted head."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from transformers import TrainingArguments

from axolotl_spft import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.trainer.fused_loss import refuse_fused_loss
from tests.models import tiny_llama
from tests.trainer.test_callback import arguments, plain

MESSAGE = "`use_liger_kernel: true` has a loss that multiplies by the head's weight itself"


@pytest.mark.parametrize("tied, targets", [(False, ["lm_head"]), (True, ["embed_tokens", "q_proj"])])
def test_it_is_refused_before_the_salience_pass(tmp_path, tied, targets):
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), SpftConfig(target_modules=targets, samples=4))
    trainer = plain(tmp_path, model)
    trainer.args.use_liger_kernel = True
    with pytest.raises(SpftError, match=MESSAGE):
        trainer.train()
    trainer.args.liger_kernel_config = {"fused_linear_cross_entropy": False}
    refuse_fused_loss(trainer, model)
    # whose loss is not the model's own
    trainer.ref_model = None
    with pytest.raises(SpftError, match=MESSAGE):
        refuse_fused_loss(trainer, model)


def test_other_heads_and_trainers_pass(tmp_path):
    for targets, asked in ((["lm_head"], False), (["embed_tokens", "q_proj"], True)):
        model = get_peft_model(tiny_llama(), SpftConfig(target_modules=targets))
        trainer = plain(tmp_path, model)
        trainer.args = arguments(TrainingArguments, tmp_path)
        trainer.args.use_liger_kernel = asked
        refuse_fused_loss(trainer, model)
