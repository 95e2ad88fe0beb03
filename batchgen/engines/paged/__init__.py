"""Continuous batching over a paged cache of keys and values, for one stream of prompts.

prompts → `scheduler` → a step: which tokens, in which pages → `runner` → their next tokens → `scheduler` → rows

- `pages`: which pages of the cache are free, and which prefixes of prompts lie in some already. Pure.
- `scheduler`: what each forward computes: one token of every running sequence, and parts of new prompts. Pure.
- `models`: which models are covered, and how their attention is exchanged for that of
- `attention`: keys and values into pages, and attention over them; on a GPU by the `kernels`, in Triton.
- `runner`: the step's arrays on the device, the compiled model, CUDA graphs of pure decode steps.
- `sampling`: the next token of each row, on the device.
- `loop`: the thread that keeps a step in flight while the one before it is read.
"""
