"""The flags of `vllm run-batch`: which of them are ours, which change nothing in the answers, and which are refused.

The names are those of vLLM 0.7 to 0.32, its server's among them, which stand in the same scripts. vLLM reads `_` for
`-` in a name, and `--name.key value` for `--name '{"key": value}'`. Flags of one dash and several letters are its own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from batchgen.commands import CommandError

_SHORT = {
    "-q": "--quantization",
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

_ADAPTER = "adapters are not supported. Merge the adapter into a copy of the model"
_CONFIG = "the model is what its folder says. Change config.json in a copy of the folder"
_TOKENIZER = "the tokenizer is the model's. Put another one into a copy of the model's folder"
_WEIGHTS = "weights are read as the model's folder has them; --dtype int8 or nf4 makes them smaller"
_KIND = "batchgen answers chats and completions. Leave it out"

_STRUCTURED = (
    "texts are constrained by llguidance, whatever the backend. What changes them is set line by line: "
    "disable_any_whitespace and disable_additional_properties in structured_outputs"
)

INSTEAD = {
    "--chat-template": "the template is the model's. Put another one into a copy of the model's folder, as "
    "chat_template.jinja, and leave it out",
    "--chat-template-content-format": "the form of a message is what the template takes. Leave it out",
    "--response-role": "the role of an answer is assistant. Leave it out",
    "--return-tokens-as-token-ids": "tokens are shown as texts. Leave it out",
    "--reasoning-parser": "reasoning stays in the text of the answer. Leave it out, and take the text apart afterwards",
    "--enable-reasoning": "reasoning stays in the text of the answer. Leave it out, and take the text apart afterwards",
    **dict.fromkeys(("--lora-modules", "--default-mm-loras", "--prompt-adapters"), _ADAPTER),
    "--qlora-adapter-name-or-path": _ADAPTER,
    **dict.fromkeys(("--tokenizer", "--tokenizer-revision", "--tokenizer-mode", "--skip-tokenizer-init"), _TOKENIZER),
    **dict.fromkeys(("--hf-config-path", "--hf-overrides", "--rope-scaling", "--rope-theta"), _CONFIG),
    **dict.fromkeys(("--model-class-overrides", "--config-format"), _CONFIG),
    **dict.fromkeys(("--quantization", "--quantization-config", "--load-format", "--model-weights"), _WEIGHTS),
    "--kv-cache-dtype": "keys and values are kept in the dtype of the model. Leave it out",
    "--override-generation-config": "give --temperature, --top-p, --top-k, --min-p, --repetition-penalty, "
    "--max-new-tokens, or set them line by line",
    "--logits-processors": "the probabilities are the model's. Leave it out",
    "--logprobs-mode": "logprobs are the model's own, before temperature. Leave it out",
    **dict.fromkeys(("--task", "--runner", "--convert"), _KIND),
    "--watermark-config": "texts are not watermarked. Leave it out",
    "--diffusion-config": "models that generate by diffusion are not supported. Leave it out",
    "--structured-outputs-config": _STRUCTURED,
    "--guided-decoding-disable-any-whitespace": _STRUCTURED,
    "--guided-decoding-disable-additional-properties": _STRUCTURED,
    "--cohere-format": "the template is the model's. Leave it out",
    "--spec-decoding-acceptance-method": "every token is the model's. Leave it out",
    "--config": "write the flags that are in that file on the command line",
}
"""Flags that would change the answers, and what to do instead."""

# The values with which those change nothing.
_NEUTRAL: Mapping[str, Collection[str]] = {
    "--chat-template-content-format": ("auto",),
    "--response-role": ("assistant",),
    "--tokenizer-mode": ("auto", "hf", "fast"),
    "--hf-overrides": ("{}",),
    "--config-format": ("auto", "hf"),
    "--quantization": ("none", "null", ""),
    "--load-format": ("auto", "hf", "safetensors", "pt", "fastsafetensors", "npcache", "runai_streamer"),
    "--kv-cache-dtype": ("auto",),
    "--override-generation-config": ("{}",),
    "--logprobs-mode": ("raw_logprobs",),
    "--task": ("auto", "generate"),
    "--runner": ("auto", "generate"),
    "--convert": ("auto", "none"),
    "--spec-decoding-acceptance-method": ("rejection_sampler",),
}

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
fully-sharded-loras gdn-prefill-backend gpu-memory-utilization grpc grpc-port guided-decoding-backend
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
pt-load-map-location ray-workers-use-nsight reasoning-config reasoning-parser-plugin renderer-num-workers
replayssm-buffer-len return-sampling-mask root-path safetensors-load-strategy safetensors-prefetch-block-size
safetensors-prefetch-num-threads scheduler-cls scheduler-delay-factor scheduler-reserve-full-isl scheduling-policy
show-hidden-metrics-for-version shutdown-timeout skip-mm-profiling sleep-mode-offload-cudagraph
sleep-preserve-parameter-names sparse-indexer-topk-backend spec-method spec-model spec-tokens specialize-active-lora
speculative-config speculative-disable-by-batch-size speculative-disable-mqa-scorer
speculative-draft-tensor-parallel-size speculative-max-model-len speculative-model speculative-model-quantization
sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile stream-interval
swa-bounded-replay swap-space tensor-parallel-size tokenizer-pool-extra-config tokenizer-pool-size tokenizer-pool-type
tokens-only tool-call-parser tool-parser-plugin tool-server tool-strict-level trust-remote-code
trust-request-chat-template trust-request-mm-kwargs typical-acceptance-sampler-posterior-alpha
typical-acceptance-sampler-posterior-threshold ubatch-size uds url use-fp64-gumbel use-replayssm use-tqdm-on-load
use-v2-block-manager uvicorn-log-level video-pruning-method video-pruning-rate watermark weight-transfer-config
worker-cls worker-extension-cls
"""
IGNORED = frozenset(f"--{name}" for name in _IGNORED.split())
"""Flags about speed, memory, the log and the server, and those that change answers only to lines that are refused."""


@dataclass
class Foreign:
    """A flag that is not ours."""

    written: str  # on the command line, without a value
    name: str  # with - for _; without the key
    key: str  # of --name.key; "" without one
    values: list[str]


class RunBatch(click.Command):
    """Click reads our own flags, in any of vLLM's spellings; the others are judged."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [option for option in self.params if isinstance(option, click.Option)]
        words, foreign = _separate(args, options, ctx.help_option_names)
        super().parse_args(ctx, words)
        if not ctx.resilient_parsing:
            names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
            ctx.args = _judge(foreign, ctx.params.get("model"), names)
        return ctx.args


def _separate(
    args: Sequence[str], options: Sequence[click.Option], helps: Sequence[str]
) -> tuple[list[str], list[Foreign]]:
    """The words for Click, and the other flags with the words behind each."""
    valued = {name for option in options if not option.is_flag for name in option.opts}
    plain = {name for option in options if option.is_flag for name in (*option.opts, *option.secondary_opts)} | set(
        helps
    )
    own: list[str] = []
    foreign: list[Foreign] = []
    values = own  # where a word goes that is no flag
    is_value = False
    for place, word in enumerate(args):
        if word == "--" and not is_value:
            own += args[place:]
            break
        if is_value or not re.match(r"-[^\d.]", word):
            (own if is_value else values).append(word)
            is_value = False
            continue
        name, key, value = _read(word)
        values = own
        if (name in valued or name in plain) and not key:
            own.append(name if value is None else f"{name}={value}")
            is_value = name in valued and value is None
        elif word[:2] in valued:
            own.append(word)
        else:
            foreign.append(Foreign(word.partition("=")[0], name, key, [] if value is None else [value]))
            values = foreign[-1].values
    objects = {name for option in options if option.metavar == "JSON" for name in option.opts}
    return [*_joined([option for option in foreign if option.name in objects]), *own], [
        option for option in foreign if option.name not in objects
    ]


def _joined(flags: Sequence[Foreign]) -> list[str]:
    """`--name.key value` of one name as `--name '{"key": value}'`."""
    objects: dict[str, dict[str, Any]] = {}
    for flag in flags:
        inner = objects.setdefault(flag.name, {})
        *outer, last = flag.key.split(".")
        for key in outer:
            inner = inner.setdefault(key, {})
        text = " ".join(flag.values)
        try:
            inner[last] = json.loads(text)
        except ValueError:  # a text needs no quotes
            inner[last] = text
    return [word for name, value in objects.items() for word in (name, json.dumps(value))]


def _read(word: str) -> tuple[str, str, str | None]:
    """Name, key and value of --name.key=value."""
    flag, equals, value = word.partition("=")
    name, _, key = flag.partition(".")
    if name.startswith("--"):
        return name.replace("_", "-"), key, value if equals else None
    if name.startswith("-O") and name != "-O":
        return "-O", key, name[2:]  # -O3
    return name, key, value if equals else None


def _judge(flags: Sequence[Foreign], model: str | None, own: Collection[str]) -> list[str]:
    """The names of those flags that change nothing in the answers.

    Raises:
        CommandError: one of them would, or nobody here knows it; what to do instead.
    """
    for flag in flags:
        name = _SHORT.get(flag.name, flag.name)
        positive = f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name
        is_off = positive != name and positive in INSTEAD
        if name in IGNORED or positive in IGNORED or is_off or _is_neutral(name, flag, model):
            continue
        if name in INSTEAD:
            raise CommandError(f"run-batch has no {flag.written}, which would change the answers: {INSTEAD[name]}")
        raise CommandError(f"run-batch has no {flag.written}{_meant(flag.name, own)}")
    return [flag.written for flag in flags]


def _is_neutral(name: str, flag: Foreign, model: str | None) -> bool:
    if name == "--structured-outputs-config":
        return _changes_no_text(flag)
    if flag.key or name not in INSTEAD:
        return False
    value = " ".join(flag.values)
    return value.lower() in _NEUTRAL.get(name, ()) or (name == "--tokenizer" and value in (model, "None"))


# Of --structured-outputs-config: what says how a constraint is enforced, and not what it is.
_HOW = frozenset({"backend", "disable_fallback", "reasoning_parser", "reasoning_parser_plugin", "enable_in_reasoning"})


def _changes_no_text(flag: Foreign) -> bool:
    text = " ".join(flag.values)
    if flag.key:
        return flag.key.replace("-", "_") in _HOW or text.lower() == "false"
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and all(key in _HOW or not each for key, each in value.items())


def _meant(name: str, own: Collection[str]) -> str:
    from batchgen.commands.run import command

    if name in {option for parameter in command.params for option in parameter.opts if option.startswith("--")}:
        return "; `batchgen run` has"
    near = difflib.get_close_matches(name, own, 1, 0.9) or difflib.get_close_matches(name, [*INSTEAD, *IGNORED], 1, 0.9)
    if near:
        return f"; is {near[0]} meant?"
    return ", and it is no flag of vLLM's that is known here: it may change the answers. Leave it out"
