"""Seeded fuzzers: each kind is a module with a function `case(seed, folder)`, which makes one case and checks it.

`case` gives a word for what came out, which is counted. It raises whatever has escaped, or AssertionError.
"""
