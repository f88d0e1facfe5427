"""Pass lists that are known to be good, as a recipe writes them: defaults, and what is advised."""

# The best for decoders, by codes of weights; activations stay in float.
BEST = "smooth,awq,rotate,gptq,pack"
# The same in seconds, and what needs no data at all.
QUICK, PLAIN = "smooth,awq,pack", "pack"
# Without data, for codes of several rows: they are meant for weights behind a rotation.
TURNED = "rotate,pack"
# Integer products on ranges of activations, and with what suits convolutions.
INTEGER, CORRECTED = "smooth,qdq", "smooth,equalize,qdq,bias_correction"
# The names of the weight formats (`formats.FORMATS`), for who tells of them without loading them.
FORMATS = (
    *("int4", "int8", "nf4", "mxfp4", "int2", "int3", "int5", "int6", "nvfp4", "fp4"),
    *("pairs2", "pairs2.5", "pairs3", "pairs3.5", "pairs4"),
)
# Those that a budget chooses from. Of less than 3 bits none but pairs: what integers change then is too much for their
# sum to be what all change.
CANDIDATES = (
    *("pairs2", "pairs2.5", "int3(group=64)", "int3(group=128)", "pairs3", "pairs3.5", "pairs4"),
    *("int4(group=32)", "int4(group=64)", "int4(group=128)", "int5(group=64)", "int5(group=128)"),
    *("int6(group=64)", "int6(group=128)", "int8(group=64)", "int8(group=128)"),
)
