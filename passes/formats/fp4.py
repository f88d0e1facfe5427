"""fp4: the 4-bit floats of bitsandbytes: 1/4 to 1 with one bit of mantissa, a subnormal, and 0."""

from qcompile.passes.formats.bnb4 import Bnb4

_LEVELS = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


class FP4(Bnb4):
    """Floats of 4 bits with a sign, max |w| of each group as their scale."""

    name, words, native = "fp4", ("FP4", "FP4Exact"), ("FP4",)
    quant_type = 0
    exact = (*_LEVELS, *(-level for level in _LEVELS))
