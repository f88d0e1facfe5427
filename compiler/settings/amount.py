"""How much may be spent: of bytes of the whole output, or of bits a weight."""

import re
from dataclasses import dataclass

from qcompile.passes.errors import UserError

_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE)


class TooLarge(UserError):
    """What was written takes `size` bytes, more than its budget; nothing of it is kept."""

    def __init__(self, size: int, amount: "Amount", excess: int) -> None:
        super().__init__(
            f"the output takes {size / 1e6:g} MB, {excess / 1e6:g} MB more than its budget of {amount}: more was added "
            "than could be foretold, such as channels in float; give a larger budget, or fewer passes"
        )
        self.size = size


@dataclass(frozen=True)
class Amount:
    """One of the two. size: bytes of the model's files. bits: mean over the weights that are quantized, with scales."""

    size: int | None = None
    bits: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Amount":
        """Of "80MB", "1.2GiB" or "3.6bpw"."""
        match = _AMOUNT.fullmatch(text)
        number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
        if not number or unit not in (*_BYTES, "bpw"):
            raise UserError(f"cannot read budget {text!r}: give the size of the output, 80MB, or bits a weight, 3.6bpw")
        return cls(bits=number) if unit == "bpw" else cls(size=int(number * _BYTES[unit]))

    def check(self, size: int) -> None:
        """Raise TooLarge for a file of more bytes."""
        if self.size is not None and size > self.size:
            raise TooLarge(size, self, size - self.size)

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight" if self.size is None else f"{self.size / 1e6:g} MB"
