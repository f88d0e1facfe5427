"""How far a model may be from its float form: one of two, by its kind."""

from dataclasses import dataclass

from qcompile.passes.errors import UserError, Verdict


class TooFar(Verdict):
    """What was written, `size` bytes, is `distance` from the float model, more than its bound allows; nothing of it is
    kept.
    """

    def __init__(self, told: str, distance: float, size: int) -> None:
        super().__init__(told)
        self.distance, self.size = distance, size


@dataclass(frozen=True)
class Bound:
    """One of the two. max_kl: nats a token, of a decoder's logits. min_sqnr: dB, of the output that is worst off."""

    max_kl: float | None = None
    min_sqnr: float | None = None

    def __bool__(self) -> bool:
        return self.max_kl is not None or self.min_sqnr is not None

    @property
    def distance(self) -> float:
        """The largest that is allowed: nats a token, or a relative error."""
        return self.max_kl if self.max_kl is not None else 10 ** (-(self.min_sqnr or 0.0) / 20)

    @property
    def settings(self) -> dict[str, float]:
        """By the names of the recipe's settings."""
        return {name: own for name in ("max_kl", "min_sqnr") if (own := getattr(self, name)) is not None}

    def check_metric(self, *, decoder: bool) -> None:
        """Raise UserError where the bound is not one for this kind of model."""
        if self.max_kl is not None and not decoder:
            raise UserError("max_kl is for decoders, and this model has no logits: give min_sqnr in dB")
        if self.min_sqnr is not None and decoder:
            told = "min_sqnr is for models without logits, and this one is a decoder"
            raise UserError(f"{told}: give max_kl in nats a token")

    def __str__(self) -> str:
        return " and ".join(f"{name} {own:g}" for name, own in self.settings.items())


NO_BOUND = Bound()
