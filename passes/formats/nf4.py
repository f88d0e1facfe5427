"""nf4: the 16 quantiles of a normal distribution that bitsandbytes stores (Dettmers et al. 2023)."""

from qcompile.passes.formats.bnb4 import Bnb4


class NF4(Bnb4):
    """Levels of a normal distribution, max |w| of each group as its scale."""

    name, words, native, foreign = "nf4", ("NF4", "NF4Exact"), ("NF4",), ("MatMulBnb4",)  # of any quant_type
    quant_type = 1
    exact = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
