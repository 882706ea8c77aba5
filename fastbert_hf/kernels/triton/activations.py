"""Activations and their gradients on float32 values inside a kernel."""

import triton
import triton.language as tl

GELU, GELU_TANH, RELU, SILU = (tl.constexpr(code) for code in range(4))
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)  # of the tanh approximation


@triton.jit
def activate(logit, ACTIVATION: tl.constexpr):
    """activation(logit)."""
    if ACTIVATION == GELU:
        result = 0.5 * logit * (1.0 + tl.erf(logit * SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 is the sigmoid of 2u
        inner = 2.0 * SQRT_2_OVER_PI * (logit + CUBIC * logit * logit * logit)
        result = logit / (1.0 + tl.exp(-inner))
    elif ACTIVATION == RELU:
        result = tl.where(logit <= 0, 0.0, logit)  # NaN stays NaN
    else:
        result = logit / (1.0 + tl.exp(-logit))
    return result


@triton.jit
def activation_gradient(grad, logit, ACTIVATION: tl.constexpr):
    """Gradient of the logit from that of its activation."""
    if ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * logit * logit)
        result = grad * (0.5 * (1.0 + tl.erf(logit * SQRT_HALF)) + logit * density)
    elif ACTIVATION == GELU_TANH:
        inner = 2.0 * SQRT_2_OVER_PI * (logit + CUBIC * logit * logit * logit)
        share = 1.0 / (1.0 + tl.exp(-inner))
        slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * logit * logit)
        result = grad * (share + logit * share * (1.0 - share) * slope)
    elif ACTIVATION == RELU:
        result = tl.where(logit <= 0, 0.0, grad)  # chosen: a gradient that is NaN or Inf is stopped too
    else:
        share = 1.0 / (1.0 + tl.exp(-logit))
        result = grad * (share * (1.0 + logit * (1.0 - share)))
    return result
