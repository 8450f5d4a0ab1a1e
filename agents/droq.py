"""DroQ (Hiraoka et al. 2022): two critics with dropout before their LayerNorm, many updates per step.

The equations are RLPD's with another mask for every pass through a critic, target and actor loss included.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import rlpd
from .rlpd import State, act, frozen, held_out, init, policy_params, policy_spec, update

__all__ = ["Config", "State", "act", "frozen", "held_out", "init", "policy_params", "policy_spec", "update"]


@dataclass(frozen=True)
class Config(rlpd.Config):
    """As published."""

    ensemble: int = 2
    dropout: float = 0.01
