"""The one patch of PEFT: a new member of its `PeftType` enum.

`peft.utils.register_peft_method` admits only names that are members of the enum, and PEFT 0.20 has no public way to
add one. `test_peft_type` fails once PEFT accepts a new name by itself.
"""

from __future__ import annotations

from peft import PeftType

NAME = "SPFT"


def _add_member() -> PeftType:
    if NAME in PeftType._member_map_:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    return member


SPFT = _add_member()
