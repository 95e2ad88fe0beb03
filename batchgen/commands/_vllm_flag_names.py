"""The names of the flags of `vllm run-batch` that are not ours, and what becomes of each.

They are those of vLLM 0.7 to 0.32, its server's among them, which stand in the same scripts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

SHORT = {
    "-O": "--optimization-level",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-dp": "--data-parallel-size",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-sc": "--speculative-config",
    "-dc": "--diffusion-config",
    "-asc": "--api-server-count",
}
"""vLLM's short forms."""

_ADAPTER = "of adapters, --adapter merges LoRA into the model. Merge another kind into a copy of the model"
_CONFIG = "the model is what its folder says. Change config.json in a copy of the folder"
_TOKENIZER = "the tokenizer is the model's. Put another one into a copy of the model's folder"
_WEIGHTS = "weights are read as the model's folder has them; --dtype fp8, int8 or int4 makes them smaller"
_KIND = "batchgen answers chats and completions. Leave it out"

_STRUCTURED = (
    "texts are constrained by llguidance, whatever the backend. What changes them is set line by line: "
    "disable_any_whitespace and disable_additional_properties in structured_outputs. It begins behind the thinking"
)

INSTEAD = {
    "--chat-template": "the template is the model's. Put another one into a copy of the model's folder, as "
    "chat_template.jinja, and leave it out",
    "--chat-template-content-format": "the form of a message is what the template takes. Leave it out",
    "--response-role": "the role of an answer is assistant. Leave it out",
    "--return-tokens-as-token-ids": "tokens are shown as texts. Leave it out; return_token_ids in "
    "a line, or --return-token-ids, gives their ids",
    **dict.fromkeys(("--default-mm-loras", "--prompt-adapters"), _ADAPTER),
    "--qlora-adapter-name-or-path": _ADAPTER,
    **dict.fromkeys(("--tokenizer", "--tokenizer-revision", "--tokenizer-mode", "--skip-tokenizer-init"), _TOKENIZER),
    **dict.fromkeys(("--hf-config-path", "--hf-overrides", "--rope-scaling", "--rope-theta"), _CONFIG),
    **dict.fromkeys(("--model-class-overrides", "--config-format"), _CONFIG),
    **dict.fromkeys(("--quantization-config", "--load-format", "--model-weights"), _WEIGHTS),
    "--kv-cache-dtype": "keys and values are kept in the dtype of the model, or in fp8 (e4m3). Choose one of them",
    "--override-generation-config": "give --temperature, --top-p, --top-k, --min-p, --repetition-penalty, "
    "--max-new-tokens, or set them line by line",
    "--logits-processors": "code for logits is not loaded. Leave it out; lines set logit_bias, allowed_token_ids, "
    "bad_words and penalties",
    "--logprobs-mode": "logprobs are the model's own, before temperature. Leave it out",
    **dict.fromkeys(("--task", "--runner", "--convert"), _KIND),
    "--watermark-config": "texts are not watermarked. Leave it out",
    "--diffusion-config": "models that generate by diffusion are not supported. Leave it out",
    "--structured-outputs-config": _STRUCTURED,
    "--guided-decoding-backend": _STRUCTURED,
    "--guided-decoding-disable-any-whitespace": _STRUCTURED,
    "--guided-decoding-disable-additional-properties": _STRUCTURED,
    "--reasoning-config": "thinking that is over its budget ends with the model's own mark, and no words before it. "
    "Leave it out; --reasoning-parser names the marks",
    "--tool-strict-level": "calls that a line may make are read as the model writes them; tool_choice required, or a "
    "named function, follows the schemas. Leave it out",
    "--no-exclude-tools-when-tool-choice-none": "the model is not told of the tools of a line whose tool_choice is "
    "none. Leave it out",
    "--cohere-format": "the template is the model's. Leave it out",
    "--spec-decoding-acceptance-method": "every token is the model's. Leave it out",
    "--config": "write the flags that are in that file on the command line",
}
"""Flags that would change the answers, and what to do instead."""

NEUTRAL: Mapping[str, Collection[str]] = {
    "--chat-template-content-format": ("auto",),
    "--response-role": ("assistant",),
    "--tokenizer-mode": ("auto", "hf", "fast"),
    "--hf-overrides": ("{}",),
    "--config-format": ("auto", "hf"),
    "--load-format": ("auto", "hf", "safetensors", "pt", "fastsafetensors", "npcache", "runai_streamer"),
    "--kv-cache-dtype": ("auto",),
    "--override-generation-config": ("{}",),
    "--logprobs-mode": ("raw_logprobs",),
    "--tool-strict-level": ("0", "off"),
    "--task": ("auto", "generate"),
    "--runner": ("auto", "generate"),
    "--convert": ("auto", "none"),
    "--spec-decoding-acceptance-method": ("rejection_sampler",),
}
"""The values with which those change nothing."""

_IGNORED = """
additional-config aggregate-engine-logging all2all-backend allow-credentials allow-deprecated-quantization
allowed-headers allowed-local-media-path allowed-media-domains allowed-methods allowed-origins
anthropic-disabled-thinking-effort api-key api-server-count async-scheduling attention-backend attention-config
aux-output-config block-size calculate-kv-scales code-revision cohere-is-reasoning-model collect-detailed-traces
compilation-config cp-kv-cache-interleave-size cpu-distributed-timeout-seconds cpu-offload-gb cpu-offload-params
cuda-graph-sizes cudagraph-capture-sizes cudagraph-metrics custom-histogram-buckets data-parallel-address
data-parallel-backend data-parallel-external-lb data-parallel-hybrid-lb data-parallel-multi-port-external-lb
data-parallel-rank data-parallel-rpc-port data-parallel-size data-parallel-size-local data-parallel-start-rank
data-parallel-supervisor-port dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend
dcp-kv-cache-interleave-size dcp-q-replicate decode-context-parallel-size device device-ids device-memory-utilization
disable-access-log-for-endpoints disable-async-output-proc disable-cascade-attn disable-chunked-mm-input
disable-custom-all-reduce disable-fastapi-docs disable-frontend-multiprocessing disable-hybrid-kv-cache-manager
disable-log-requests disable-log-stats disable-logprobs-during-spec-decoding disable-mm-preprocessor-cache
disable-nccl-for-dp-synchronization disable-sliding-window disable-uvicorn-access-log distributed-executor-backend
distributed-timeout-seconds download-dir dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s
dp-supervisor-probe-timeout-s dp-sync-interval ec-manager-config ec-transfer-config elastic-ep-max-dp-size
enable-auto-tool-choice enable-batch-sharded-sampling enable-bf16x3-router-gemm enable-chunked-prefill
enable-cumem-allocator enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel
enable-fault-tolerance enable-flash-late-interaction enable-flashinfer-autotune enable-force-include-usage
enable-hc-sp enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs enable-log-requests
enable-logging-iteration-details enable-lora enable-lora-bias enable-mamba-cache-stochastic-rounding
enable-mamba-shared-prefix-checkpoint enable-metrics enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds
enable-mm-processor-stats enable-moe-shared-loras enable-multimodal-encoder-data-parallel enable-nccl-comm-suspend
enable-offline-docs enable-per-request-metrics enable-prefix-caching enable-prompt-adapter enable-prompt-embeds
enable-prompt-tokens-details enable-request-id-headers enable-return-routed-experts enable-scale-out
enable-server-load-tracking enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh
enable-tokenizer-info-endpoint enable-tower-connector-lora enable-trace-replay enforce-eager engram-config eplb-config
eplb-log-balancedness eplb-step-interval eplb-window-size exclude-tools-when-tool-choice-none
expert-placement-strategy fail-on-environ-validation fault-tolerance-config fingerprint-mode fingerprint-value
fully-sharded-loras gdn-prefill-backend gpu-memory-utilization grpc grpc-port
guided-decoding-disable-fallback
h11-max-header-count h11-max-incomplete-event-size headless hf-token host ignore-patterns interleave-mm-strings
io-processor-plugin ir-op-priority jit-monitor-mode jit-monitor-verbose kda-decode-backend kda-prefill-backend
kernel-config kv-cache-dtype-skip-layers kv-cache-memory-bytes kv-cache-metrics kv-cache-metrics-sample
kv-events-config kv-offloading-backend kv-offloading-size kv-sharing-fast-prefill kv-transfer-config
language-model-only limit-mm-per-prompt linear-backend log-config-file log-error-stack log-level logging-config
logits-processor-pattern long-lora-scaling-factors long-prefill-token-threshold long-prefill-token-threshold-adaptive
lora-dtype lora-extra-vocab-size lora-target-modules mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode
mamba-cache-philox-rounds mamba-config mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr master-port max-cpu-loras
max-cudagraph-capture-size max-log-len max-logprobs max-long-partial-prefills max-lora-cls-labels max-lora-rank
max-loras max-model-len max-num-active-seqs max-num-batched-tokens max-num-partial-prefills max-num-queued-reqs
max-num-queued-tokens max-num-scheduled-tokens max-parallel-loading-workers max-prompt-adapter-token
max-prompt-adapters max-seq-len-to-capture media-io-kwargs middleware mm-device-do-normalize mm-encoder-attn-backend
mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path
mm-encoder-only mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb
mm-processor-cache-type mm-processor-device mm-processor-kwargs mm-shm-cache-max-object-size-mb mm-tensor-ipc
model-impl model-loader-extra-config moe-backend monokernel multi-step-stream-outputs ngram-prompt-lookup-max
ngram-prompt-lookup-min nnodes node-rank num-gpu-blocks-override num-lookahead-slots num-redundant-experts
num-scheduler-steps num-speculative-tokens numa-bind numa-bind-cpus numa-bind-nodes offload-backend offload-group-size
offload-num-in-group offload-params offload-prefetch-step optimization-level otlp-traces-endpoint output-tmp-dir
override-attention-dtype override-neuron-config override-pooler-config per-request-spec-decode-metrics
performance-mode pipeline-parallel-size pooler-config port preemption-mode prefill-context-parallel-size
prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo prefix-match-unit profiler-config
pt-load-map-location ray-workers-use-nsight reasoning-parser-plugin renderer-num-workers
replayssm-buffer-len return-sampling-mask root-path safetensors-load-strategy safetensors-prefetch-block-size
safetensors-prefetch-num-threads scheduler-cls scheduler-delay-factor scheduler-reserve-full-isl scheduling-policy
show-hidden-metrics-for-version shutdown-timeout skip-mm-profiling sleep-mode-offload-cudagraph
sleep-preserve-parameter-names sparse-indexer-topk-backend spec-method spec-model spec-tokens specialize-active-lora
speculative-config speculative-disable-by-batch-size speculative-disable-mqa-scorer
speculative-draft-tensor-parallel-size speculative-max-model-len speculative-model speculative-model-quantization
sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile stream-interval
swa-bounded-replay swap-space tensor-parallel-size tokenizer-pool-extra-config tokenizer-pool-size tokenizer-pool-type
tokens-only tool-parser-plugin tool-server trust-remote-code
enable-reasoning no-trust-request-chat-template trust-request-mm-kwargs typical-acceptance-sampler-posterior-alpha
typical-acceptance-sampler-posterior-threshold ubatch-size uds url use-fp64-gumbel use-replayssm use-tqdm-on-load
use-v2-block-manager uvicorn-log-level video-pruning-method video-pruning-rate watermark weight-transfer-config
worker-cls worker-extension-cls
"""
IGNORED = frozenset(f"--{name}" for name in _IGNORED.split())
"""Flags about speed, memory, the log and the server, and those that change answers only to lines that are refused."""
