"""The salience metrics by name: where the score function of each one is, a line each."""

from __future__ import annotations

import re

METRICS = {
    "gradient": "axolotl_spft.salience.metrics.gradient:score",
    "balanced": "axolotl_spft.salience.metrics.balanced:score",
    "snip": "axolotl_spft.salience.metrics.snip:score",
    "force": "axolotl_spft.salience.metrics.force:score",
    "taylor_fo": "axolotl_spft.salience.metrics.taylor_fo:score",
    "fisher": "axolotl_spft.salience.metrics.fisher:score",
    "magnitude": "axolotl_spft.salience.metrics.magnitude:score",
    "synflow": "axolotl_spft.salience.metrics.synflow:score",
    "grasp": "axolotl_spft.salience.metrics.grasp:score",
    "lift": "axolotl_spft.salience.metrics.lift:score",
    "relative": "axolotl_spft.salience.metrics.relative:score",
    "random": "axolotl_spft.salience.metrics.random:score",
}

# those whose score is made of the gradient and the weight, so that a training's own backward pass gives it
ON_THE_WAY = ("gradient", "balanced", "snip", "force", "taylor_fo", "relative")

_OF_THE_USER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_salience(value: object) -> bool:
    """Whether ``value`` is a metric's name or has the form ``package.module:function``."""
    return isinstance(value, str) and (value in METRICS or bool(_OF_THE_USER.fullmatch(value)))
