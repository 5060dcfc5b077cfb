"""Where a run stands, besides its tensors: what the manifest of a checkpoint carries."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ldct_dist.train.guard import Guard


@dataclass
class TrainState:
    """Counters of a run. No other state is needed: samples follow from the seed and `position`, random numbers from
    the seed and `step`.
    """

    store: str
    """fingerprint of the store it is trained on"""
    step: int = 0
    """steps done"""
    moved: int = 0
    """batches passed over by rollbacks, which go back to earlier weights, but not to earlier data"""
    guard: Guard = field(default_factory=Guard)
    best: float | None = None
    """lowest validation RMSE so far, HU, of those measured on `basis`"""
    basis: dict[str, Any] | None = None
    """what the latest validation was measured on, and how; None if there was none, or an old version did not record it"""
    validated: tuple[int, float | None] | None = None
    """step of the latest validation, and its RMSE in HU; None where it has none"""

    @property
    def position(self) -> int:
        """The batch that the next step learns from, in the order of the plan."""
        return self.step + self.moved

    @property
    def is_validated(self) -> bool:
        """Whether the weights of just this step were validated."""
        return self.validated is not None and self.validated[0] == self.step

    def note_validation(self, rmse_hu: float | None, basis: dict[str, Any]) -> bool:
        """Record the RMSE measured at this step; returns whether it is the lowest so far on this basis."""
        self.validated = (self.step, rmse_hu)
        if basis != self.basis:
            self.basis, self.best = basis, None
        improved = rmse_hu is not None and (self.best is None or rmse_hu < self.best)
        self.best = rmse_hu if improved else self.best
        return improved

    def pass_over_validation(self) -> None:
        """Count this step as validated, without a figure."""
        self.validated = (self.step, None)

    def after_rollback_of(self, before: TrainState) -> TrainState:
        """This state, of a checkpoint, changed to follow `before`, which was rolled back to it.

        The run continues with the batch that `before` would have been given next.
        """
        self.moved = before.position - self.step
        self.guard.skipped, self.guard.rollbacks = before.guard.skipped, before.guard.rollbacks + 1
        self.guard.stretch = []
        return self

    def counters(self) -> dict[str, Any]:
        """For the manifest's JSON. `validation`: the RMSE of exactly this step's weights, if it was measured."""
        return {
            "store": self.store,
            "step": self.step,
            "moved": self.moved,
            "guard": asdict(self.guard),
            "best": self.best,
            "basis": self.basis,
            "validated": self.validated,
            "validation": self.validated[1] if self.validated is not None and self.is_validated else None,
        }

    @classmethod
    def of(cls, counters: dict[str, Any]) -> TrainState:
        return cls(
            store=counters["store"],
            step=counters["step"],
            moved=counters["moved"],
            guard=Guard(**counters["guard"]),
            best=counters["best"],
            basis=counters.get("basis"),  # which older checkpoints lack
            validated=tuple(counters["validated"]) if counters["validated"] is not None else None,
        )
