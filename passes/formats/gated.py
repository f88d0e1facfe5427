"""SwiGLU: the two halves of a joined product, of which one gates the other. It reads no weight."""

SWIGLU = "SwiGLU"
