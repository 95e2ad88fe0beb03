"""Weights of 8 and 4 bits: the formats of checkpoints, and those that are made here.

`weight.QuantisedWeight` is the one form that all of them are read into.
"""
