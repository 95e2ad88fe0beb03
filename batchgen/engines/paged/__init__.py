"""Continuous batching over a paged KV cache, for one stream of prompts.

How a step is made, by `loop`, in a thread of its own:

1. wait: take the prompts that `engine` has submitted; with nothing else to do, wait for some (`loop`).
2. plan: preempt if the cache is full, let every running sequence decode a token, admit waiting ones and prefill a chunk
   of each (`scheduler`; `admission` says who fits, `prefill_budget` how much a step takes, `page_tables` which pages;
   `layer_groups` which layers share them, so that layers with a window give back what it has passed).
3. launch: send the step's arrays to the device (`step_buffers`), set the layout, run the model as a CUDA graph
   (`graphs`), choose the next tokens (`runner`); over several ranks, tell the others first (`lockstep`).
4. read: wait for the tokens of the step before (`launched_step`), give them to their sequences (`finished_rows`).
5. choose: where rows of the launched step awaited those tokens, choose its own only now (`runner`).
6. finish: hand over the rows that have ended, the first ones after the self-test (`first_rows`); `engine` yields them.

Which models are covered, `models` finds out from the config and by a trial of a small one. Inside the model, it has put
`attention` (by `kernels` on a GPU) and `linear` (by `skinny_gemm`) in the place of Transformers' own; `layout` tells
attention which token belongs where, and `adapters`, which `linear` asks, whose adapter each token has. Weights of 8 and
4 bits `linear` and `experts` multiply by `quantised`. With `kv_dtype` fp8 the cache holds what `rounding` makes of keys
and values, in `rounding_kernels` on a GPU.

Each module imports only modules of the rows below its own:

    engine
    loop
    first_rows
    lockstep   finished_rows
    runner     scheduler   weights
    models     graphs   prompt_logprobs   launched_step   admission   prefill_budget   sizing
    attention  linear   alone   cache
    quantised
    kernels    skinny_gemm    adapters
    layout     step_buffers   online_softmax     page_tables
    page_rows  step           layer_groups       experts
    pages      not_covered    rounding           rounding_kernels   kernel_settings
"""
