"""What quantization changed: of single nodes, of outputs, of predictions; and what was seen of activations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeError:
    """A packed node on the check batches.

    error: ‖y - X W‖ / ‖X W‖ with W the float weight. operator_error: the same with the dequantized weight Ŵ in the
    place of W: what the operator itself adds. int8_error: ‖(Q8(X) - X) Ŵ‖ / ‖X Ŵ‖, what int8 activations would add in a
    kernel; None where it was not measured. activation_bits: 16, or 8 where the node says so. weights: K times N.
    """

    node: str
    error: float
    operator_error: float
    int8_error: float | None = None
    activation_bits: int = 16
    weights: int = 0


@dataclass(frozen=True)
class OutputError:
    """An output of the compiled model against the float one, on batches that the report names (`Report.measured`).

    relative: ‖a - b‖ / ‖b‖, cosine: between the two. error: the standard error of `relative` over rows, taken as
    independent; None of one row.
    """

    name: str
    relative: float
    cosine: float
    error: float | None = None

    @property
    def told(self) -> str:
        """The relative error with its own."""
        return f"{self.relative:.3g}" + (f" ± {self.error:.2g}" if self.error is not None else "")


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions on the batches that the report names (`Report.measured`); `qcompile eval` has more.

    tokens: scored ones. before, after: perplexity of the float and of the compiled model. kl: KL(float ‖ compiled),
    nats a token; kl_error: its standard error over tokens, taken as independent. agreement: share of equal most likely
    tokens.
    """

    tokens: int
    before: float
    after: float
    kl: float
    agreement: float
    kl_error: float | None = None

    @property
    def told_kl(self) -> str:
        """KL with its standard error."""
        return f"{self.kl:.3g}" + (f" ± {self.kl_error:.1g}" if self.kl_error is not None else "")

    def told(self) -> str:
        """In a line."""
        return (
            f"KL {self.told_kl} nats a token, perplexity {self.before:.4g} → {self.after:.4g}, same most likely token "
            f"{self.agreement:.0%}, on {self.tokens} tokens"
        )


@dataclass(frozen=True)
class Speed:
    """A paired run of both models on one batch of `rows` rows: medians in ms, of so many runs each; ratio: of compiled
    to float, low and high: its quartiles.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    runs: int
    rows: int

    @property
    def slower(self) -> bool:
        """Whether the compiled model is slower beyond the spread of the runs."""
        return self.low > 1.0

    def told(self) -> str:
        """In a line."""
        word = f"{self.ratio:.2f} × the time: SLOWER than the float model" if self.slower else f"{1 / self.ratio:.2f} ×"
        return (
            f"{self.before:.3g} → {self.after:.3g} ms a run of {self.rows} rows, {word} "
            f"(medians of {self.runs} runs in turns, all cores, quartiles {1 / self.high:.2f} to {1 / self.low:.2f} ×)"
        )


@dataclass(frozen=True)
class ActivationRange:
    """What was observed of an activation value on the calibration data, and the range [low, high] chosen for its codes.

    counts: how many numbers fell between edges[i] and edges[i + 1], len(edges) = len(counts) + 1; both empty where
    the observer keeps no histogram. Raises ValueError where the two do not fit.
    """

    value: str
    low: float
    high: float
    observed_low: float
    observed_high: float
    observer: str
    counts: tuple[int, ...] = ()
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.counts and len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.edges)} edges for {len(self.counts)} counts of {self.value}")


@dataclass(frozen=True)
class RowsSeen:
    """Rows of activations that statistics were taken of, (fewest, most) over the activations.

    seen: in all. held: of those, rows that no choice was fitted to until it was judged on them.
    """

    seen: tuple[int, int]
    held: tuple[int, int]

    def __str__(self) -> str:
        seen, held = (f"{low}" if low == high else f"{low} to {high}" for low, high in (self.seen, self.held))
        return f"{seen} rows an activation, {held} of them held aside to judge choices on"

    def joined(self, other: "RowsSeen | None") -> "RowsSeen":
        """Both together."""
        if other is None:
            return self
        pairs = ((self.seen, other.seen), (self.held, other.held))
        seen, held = ((min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs)
        return RowsSeen(seen, held)
