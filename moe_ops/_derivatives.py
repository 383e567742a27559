"""The activations' derivatives in closed form, elementwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import ACTIVATIONS, Scalar


def activation_and_derivatives(
    activation: str, gate: Tensor, up: Tensor | None, **parameters: Scalar
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a, da/dgate, da/dup) of a = activation(gate, up); no up where it isn't gated.

    `parameters`: alpha, beta, limit, where they aren't the activation's defaults.
    """
    parameters = ACTIVATIONS[activation].defaults | parameters
    if activation in _JOINT:
        return _JOINT[activation](gate, up, **parameters)
    value, slope = _UNGATED[_BRANCH_OF.get(activation, activation)](gate)
    if up is None:
        return value, slope, None
    return value * up, slope * up, value


def _silu(x):
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu(x):
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x):
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (x + 0.044715 * x**3))
    inner = scale * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _relu(x):
    return F.relu(x), (x > 0).to(x.dtype)


def _relu2(x):
    y = F.relu(x)
    return y * y, 2 * y


def _identity(x):
    return x, torch.ones_like(x)


_UNGATED = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "identity": _identity,
}
# Gated: this of the gate, times up.
_BRANCH_OF = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def _clamped(x, low, high):
    """The value, and 1 where nothing was cut off: as torch.clamp's gradient has it."""
    inside = x <= high if low is None else (x >= low) & (x <= high)
    return torch.clamp(x, min=low, max=high), inside.to(x.dtype)


def _swiglu_oai(gate, up, alpha, beta, limit):
    g, g_inside = _clamped(gate, None, limit)
    u, u_inside = _clamped(up, -limit, limit)
    s = torch.sigmoid(alpha * g)
    slope = s + alpha * g * s * (1 - s)
    return g * s * (u + beta), slope * (u + beta) * g_inside, g * s * u_inside


def _swiglu_step(gate, up, limit):
    value, slope = _silu(gate)
    g, g_inside = _clamped(value, None, limit)
    u, u_inside = _clamped(up, -limit, limit)
    return g * u, slope * g_inside * u, g * u_inside


def _situ(gate, up, beta, limit):
    t, s = torch.tanh(gate / beta), torch.sigmoid(gate)
    tu = torch.tanh(up / limit)
    left, right = beta * t * s, limit * tu
    slope = (1 - t * t) * s + beta * t * s * (1 - s)
    return left * right, slope * right, left * (1 - tu * tu)


_JOINT = {"swiglu_oai": _swiglu_oai, "swiglu_step": _swiglu_step, "situ": _situ}
