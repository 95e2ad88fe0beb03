"""Compiles for a GPU what a model needs while its weights are still being read.

The first forwards of a model wait for compilers, in a new process on a new machine for half a minute. What is compiled
depends on the model's code and on shapes, not on its weights; so two threads run a model of the same sizes, of zeros,
with one layer of each kind:

- one runs the layers as they are, for which Triton compiles the kernels of this package;
- the other imports torch's compiler, and has it compile the layers.

The loaded model finds the kernels of both: Triton and torch keep them by shapes and code, for the whole process. What
fails here is compiled by the loaded model, as if there had been no warm-up.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from batchgen import device as devices
from batchgen.engines.paged.forward import Forward
from batchgen.engines.paged.models.small_config import cut_layers, shrink_whole
from batchgen.engines.paged.models.structure import find_body, find_layers
from batchgen.engines.paged.step import StepLimits
from batchgen.models import architectures
from batchgen.models.construction import tell_when_made
from batchgen.models.definition.build import build_empty
from batchgen.packages import without_garbage_collection

logger = logging.getLogger(__name__)

_MOST_MEMORY = 0.8  # of what is free, with the weights that are still to come
_COPIES = 2  # of the layers, at most: those that are compiled have products of their own that were joined


@dataclass(frozen=True)
class Subject:
    """What the warm-up is for."""

    config: Any  # of the whole model
    dtype: torch.dtype
    device: torch.device
    choose_limits: Callable[[int, int], StepLimits]  # of the parameters of a model, and of the bytes free beside it
    compiler: str = "inductor"  # the backend of `torch.compile`


# Warning: threads beside one that makes and loads a model of Transformers. This is safe by the order of things:
#
# - The model of zeros is made before, by the thread that loads. While Transformers makes a model, torch's default dtype
#   is the model's, and some functions of torch and of Transformers are others, for the whole process.
# - torch's compiler restores the default dtype and the states of random generators when it has compiled
#   (`torch._dynamo.convert_frame.preserve_global_state`), patches `nn.Module.__call__` while it traces, and
#   `torch.compiler.is_compiling` is true meanwhile. So it compiles only once the modules of the loaded model have been
#   made (`tell_when_made`), and until the block ends; in between weights are copied, and nothing is drawn, made or
#   called. Random weights (`random_weights`) come after it.
# - What the first thread runs does not depend on such state: tensors are made with a dtype of their own, and are zeros;
#   the layout of a step, inference mode and the current GPU belong to a thread. A patched `__call__` calls the module.
# - No graph is captured: a capture is disturbed by other threads.


@contextmanager
def compile_meanwhile(subject: Subject) -> Iterator[None]:
    """Meanwhile, a model is loaded inside; when the block has ended, all is compiled, and memory is free.

    Never fails by itself. An error that leaves the block waits only for what has been begun.
    """
    warm_up = _WarmUp(subject)
    try:
        # Imports and compilers make millions of objects that stay.
        with without_garbage_collection(), tell_when_made(warm_up.allow_compiler):
            yield
            warm_up.end()
    except BaseException:
        warm_up.cancel()
        warm_up.end()
        raise


class _WarmUp:
    """The two threads, and what they share."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._may_compile, self._is_cancelled = threading.Event(), threading.Event()
        self._twin: Future[tuple[Any, StepLimits]] = Future()  # the model that is compiled, and the limits of its steps
        self._memory: list[Any] = []  # pools of the GPU's memory
        self._started = time.monotonic()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="warm-up")
        self._tasks: list[Future[None]] = []
        try:
            model = _build_empty(subject.config, subject.dtype)
        except Exception as error:  # the code of hundreds of families; loading the model says what is wrong
            logger.debug("no warm-up: %s", error)
            return
        self._tasks = [
            self._threads.submit(self._run_kernels, model),
            self._threads.submit(self._compile_layers),
        ]

    def allow_compiler(self) -> None:
        """Says that the modules of the loaded model have been made."""
        self._log("the model's modules are made")
        self._may_compile.set()

    def cancel(self) -> None:
        """Says that nobody needs what is not yet begun."""
        self._is_cancelled.set()

    def end(self) -> None:
        """Waits for the threads, and gives back their memory."""
        if not self._may_compile.is_set():  # no model has been made, or this Transformers does not say so
            self.cancel()
        self._may_compile.set()
        self._log("the model is loaded")
        self._threads.shutdown()
        self._log("the threads have ended")
        for task in self._tasks:
            if (error := task.exception()) is not None:
                # As text: a record of the error itself would hold the model that its frames hold.
                logger.debug("the warm-up has failed: %s", "".join(traceback.format_exception(error)))
        self._tasks, self._twin = [], Future()
        gc.collect()  # modules refer to each other
        self._memory.clear()
        devices.release()

    def _run_kernels(self, model: Any) -> None:
        """Fills the model with zeros, hands over a copy of it, and runs its layers as they are."""
        subject = self._subject
        try:
            with self._own_memory():
                limits = self._choose_limits(model)
                _fill_with_zeros(model, subject.device)
                shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
                self._twin.set_result((copy.deepcopy(model, shared), limits))
                self._log("the model of zeros is made")
                forward = Forward(model, limits, compiler="")
                forward.allocate(1)
                with torch.inference_mode():
                    for rehearse in forward.list_rehearsals():
                        if self._is_cancelled.is_set():
                            return
                        rehearse()
                        self._log("kernels are compiled")
        except BaseException as error:
            if not self._twin.done():
                self._twin.set_exception(error)
            raise

    def _choose_limits(self, model: Any) -> StepLimits:
        """The limits that the loaded model will have, or nearly so: kernels depend on what divides them.

        Raises:
            MemoryError: there is no room for the warm-up beside the weights.
        """
        subject = self._subject
        parameters = _estimate_parameters(subject.config, model)
        weights = parameters * subject.dtype.itemsize
        own = sum(parameter.numel() for parameter in model.parameters()) * subject.dtype.itemsize
        free = devices.free_bytes([subject.device], 1)
        if weights + _COPIES * own > _MOST_MEMORY * free:
            raise MemoryError(f"{free} bytes are too few for a warm-up beside {weights} bytes of weights")
        return subject.choose_limits(parameters, free - weights)

    def _compile_layers(self) -> None:
        """Has torch compile the layers of the copy."""
        _start_compiler()
        self._log("the compiler is imported")
        model, limits = self._twin.result()
        self._may_compile.wait()
        if self._is_cancelled.is_set():
            return
        with self._own_memory():
            forward = Forward(model, limits, compiler=self._subject.compiler)
            forward.allocate(1)
            # The same calls as those of the loaded model: the compiler looks at the first sizes.
            with torch.inference_mode():
                for tokens in forward.rehearsed_tokens:
                    forward.rehearse(tokens)
                    self._log("the layers are compiled")

    def _log(self, event: str) -> None:
        logger.debug("warm-up: %s after %.1f s", event, time.monotonic() - self._started)

    @contextmanager
    def _own_memory(self) -> Iterator[None]:
        """What this thread allocates inside does not lie between the weights, where it would leave holes."""
        device = self._subject.device
        if device.type != "cuda":
            yield
            return
        torch.cuda.set_device(device)
        pool = torch.cuda.MemPool()
        self._memory.append(pool)
        with torch.cuda.use_mem_pool(pool, device):
            yield
            torch.cuda.synchronize(device)


def _build_empty(config: Any, dtype: torch.dtype) -> Any:
    """A model of the config's sizes without memory, with one layer of each kind."""
    text = cut_layers(config)
    whole = text if architectures.auto_class(text) is not None else shrink_whole(config, text)
    return build_empty(whole, dtype).eval()


def _fill_with_zeros(model: Any, device: torch.device) -> None:
    model.to_empty(device=device)
    model.tie_weights()
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data.zero_()


def _estimate_parameters(config: Any, model: Any) -> int:
    """The parameters of the whole model, or somewhat more, from `model`, which has some of its layers."""
    layers = find_layers(find_body(model), model.config.get_text_config().num_hidden_layers)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    given = sum(parameter.numel() for parameter in model.parameters())
    missing = config.get_text_config().num_hidden_layers - len(layers)
    return int(given + missing * max(sizes))


def _start_compiler() -> None:
    """Imports torch's compiler, which takes seconds, and starts the processes that compile for it."""
    import torch._inductor.compile_fx
    import torch._inductor.lowering
    from torch._inductor import async_compile

    # Until they are ready, it compiles one kernel after the other by itself. Of a torch without this method, they are
    # started by the first kernel.
    wakeup = getattr(async_compile.AsyncCompile, "wakeup", None)
    if wakeup is not None and torch.cuda.is_available():
        wakeup()
