"""Mixtures of experts: each token goes through a few of a layer's feed-forward networks, which a router has chosen.

A pair is a token and one of its experts; T tokens with K experts each are T × K pairs, and pair p is of token p // K.

    pairs by token ─routing.sort_by_expert→ pairs by expert, and where each expert's begin
                   ─grouped_gemm.multiply→ gate and up of each pair, by its expert's weights
                   ─the model's own gate→ one inner vector a pair
                   ─grouped_gemm.multiply→ one output a pair
                   ─combining.combine→ weighted sum of each token's K outputs

`interface` is what Transformers calls in place of its own loop over experts. Sorting and products are operators that
the compiler does not look into. On a GPU they are Triton kernels whose launches depend on shapes alone: how many pairs
an expert has stays on the GPU, so that a step can be captured in a CUDA graph.
"""

from batchgen.engines.paged.experts.interface import NAME, install

__all__ = ["NAME", "install"]
