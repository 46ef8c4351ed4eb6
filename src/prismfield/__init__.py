"""Prismfield: train, look at and ship neural scene representations."""
