"""Products of weights of 8 and 4 bits: of linear layers, and of experts.

    a layer's QuantisedWeight ─packing.pack→ the tensors that the operators of `products` take
    inputs ─rounding.round_inputs→ in the 8 bits that some weights ask for, with scales; else as they are
           ─products.multiply, multiply_grouped→ outputs in the type of the model

On a CPU the operators are the float reference. On a GPU those of 4 bits are package humming-kernels, where it is there
(`humming_products`); else they are Triton kernels (`four_bits_kernel`, `eight_bits_kernel`) or, for many tokens, the
libraries' products, of weights that `widening_kernel` makes 16 bits of where there is none of 4. Which it is depends on
shapes alone, so that a step can be captured in a CUDA graph.
"""
