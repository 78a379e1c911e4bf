"""The one patch of PEFT: a member of an enum."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from axolotl_spft import SpftConfig, SpftModel
from axolotl_spft.peft_type import SPFT


def test_it_is_a_member_like_any_other():
    assert PeftType("SPFT") is PeftType["SPFT"] is PeftType.SPFT is SPFT
    assert SPFT in list(PeftType)
    assert isinstance(SPFT, PeftType)
    assert SPFT == "SPFT"
    assert copy.deepcopy(SPFT) is SPFT
    assert pickle.loads(pickle.dumps(SPFT)) is SPFT
    assert json.loads(json.dumps({"peft_type": SPFT})) == {"peft_type": "SPFT"}
    assert PEFT_TYPE_TO_CONFIG_MAPPING[SPFT] is SpftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[SPFT] is SpftModel


def test_the_patch_is_still_needed():
    """Fails once PEFT registers a new name by itself: `axolotl_spft.peft_type` can go then."""
    code = (
        "from peft import PeftConfig\n"
        "from peft.tuners.shira import ShiraModel\n"
        "from peft.utils import register_peft_method\n"
        "class C(PeftConfig): pass\n"
        "class M(ShiraModel): prefix = 'zz_'\n"
        "register_peft_method(name='zz', config_cls=C, model_cls=M, prefix='zz_')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ZZ" in done.stderr or "zz" in done.stderr
