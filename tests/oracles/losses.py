"""The objectives in float64 numpy, as their papers write them, and their slopes by central differences."""

import numpy as np


def repo(logps_B2, lengths_B2, *, gamma):
    m = logps_B2 / lengths_B2
    return np.array([max(0.0, gamma - (w - r)) for w, r in m])


def simpo(logps_B2, lengths_B2, *, beta, gamma, label_smoothing=0.0):
    losses = []
    for w, r in logps_B2 / lengths_B2:
        x = beta * (w - r - gamma)
        right, flipped = np.log1p(np.exp(-x)), np.log1p(np.exp(x))
        losses.append((1 - label_smoothing) * right + label_smoothing * flipped)
    return np.array(losses)


def slopes(loss, logps_B2, lengths_B2, h=1e-5, **hparams):
    """d sum(loss) / d logps."""
    out = np.zeros_like(logps_B2)
    for index in np.ndindex(*logps_B2.shape):
        step = np.zeros_like(logps_B2)
        step[index] = h
        out[index] = (
            loss(logps_B2 + step, lengths_B2, **hparams).sum() - loss(logps_B2 - step, lengths_B2, **hparams).sum()
        ) / (2 * h)
    return out
