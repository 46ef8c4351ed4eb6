"""The cutoffs of compositing, named once. `csrc/constants.h` repeats them for the compiler; a test holds the two equal."""

ALPHA_MIN = 1.0 / 255.0
"""A primitive contributes to a pixel only where its alpha reaches this (3D Gaussian Splatting, arXiv:2308.04079)."""
ALPHA_MAX = 0.99
"""Alpha is clamped here, so that transmittance never reaches 0 and the backward pass can divide by 1 - alpha."""
TRANS_MIN = 1e-4
"""A pixel is finished before the primitive that would take its transmittance to this or below."""
NEAR = 0.01
"""Primitives closer than this to the camera plane, in world units, are not drawn."""
BLUR = 0.3
"""Variance in square pixels added to a projected Gaussian: the pixel's own footprint."""
VIEW_MARGIN = 0.15
"""The projection is linearised no further outside the image than this fraction of its size (EWA breaks down there)."""
