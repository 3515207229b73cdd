"""Pure functions on tensors: rounding to low bits, GPTQ, channel scores, least squares."""
