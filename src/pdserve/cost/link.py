"""How much of a transfer the request sees.

Layer by layer, a transfer runs beside the prefill: what remains visible is a constant (messages,
the last layer, the check), and what the link could not carry in the time of the prefill. In one
shot all of it is visible (Splitwise, sec. IV-C and fig. 14).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """``fixed_s``: visible whatever the size. ``per_byte_s``: seconds for a byte on the link.
    ``hidden_share``: of the time of a prefill, what can be used for sending (layer-wise: nearly
    all; one-shot: none)."""

    fixed_s: float
    per_byte_s: float
    hidden_share: float = 0.0

    def exposed_s(self, num_bytes: int, prefill_s: float = 0.0) -> float:
        """Seconds from the end of the prefill until the receiver owns the request."""
        return self.fixed_s + max(0.0, num_bytes * self.per_byte_s - self.hidden_share * prefill_s)


FREE_LINK = LinkModel(fixed_s=0.0, per_byte_s=0.0)
