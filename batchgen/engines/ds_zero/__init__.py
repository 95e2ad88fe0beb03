"""Engine `ds-zero`: DeepSpeed ZeRO stage 3, whose ranks share all weights and gather each layer for its turn.

- `engine`: the engine itself; `deepspeed_config` makes DeepSpeed's configuration.
- `gather` gathers whole layers for their turn; `decoder_layers` finds them in a model.
- `offload` plans where weights wait, in host memory or on NVMe; `prepare_offload` carries the plan out: `checks`
  refuses what cannot fit before a weight is loaded, `swap` keeps a run's swap files to itself, and `bandwidth` measures
  what the path can do, and says how much of it a step has used.
- `quantization`: weights of 4 and 8 bits under ZeRO.
- `extensions`: DeepSpeed's compiled operations, built once.

With offload every forward brings all weights in, so its time is at least their bytes divided by the bandwidth, however
large the batch: only a larger batch and fewer bytes a weight (`quantization`) raise the throughput.

Transformers' `synced_gpus` keeps a rank that has finished inside `generate` until the slowest one has, growing its
cache all the while; here nobody waits for anybody's batch.
"""
