"""A Transformers model from its folder: the checks, the sentences, and the loader's settings that engines share."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from transformers.integrations import sdpa_attention

from batchgen import device
from batchgen.engine import Died, EngineError
from batchgen.models import architectures, lora, random_weights, split_folder
from batchgen.models.definition.build import explain_shapes
from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.definition.model_config import read_config
from batchgen.models.folder import weight_files
from batchgen.models.loading_report import check_report
from batchgen.models.quantised import checkpoint as quantised
from batchgen.types import UserError
from batchgen.world import World

_repeated = sdpa_attention.repeat_kv

# What the code of a model raises that it was not written for, and words of errors that are the machine's.
_OF_CODE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
_OF_MACHINE = re.compile(r"gloo|nccl|cuda|cublas|cudnn|triton", re.IGNORECASE)

FLOATING = ("float32", "bfloat16", "float16")


def prepare_transformers() -> None:
    """Keeps Transformers from writing what is no error, its progress bars from logs, and the heads of keys apart."""
    sdpa_attention.repeat_kv = _repeated_whole
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # Transformers 5.17 warns, wrongly, of a model whose first layer lies on a disk; 5.23 no longer does.
    warnings.filterwarnings("ignore", r"You are calling \.generate\(\) with the `input_ids` being on", UserWarning)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _repeated_whole(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Keys or values [rows, heads, tokens, size] for `n_rep` times as many heads, each with memory of its own.

    Of a single head, which is also what a rank has where a model is split into as many ranks as it has key/value heads,
    Transformers makes views of the same memory. Given those, PyTorch's memory-efficient kernel reads the mask of a
    block's only query wrong, at widths of 32 n + 1, and padded rows get another text:
    https://github.com/pytorch/pytorch/issues/191937.
    """
    return _repeated(hidden_states, n_rep).contiguous()


def read_head_once(model: Any) -> None:
    """Has the head's weights read once for all rows of a prompt's last token, in a model that is not trained.

    Those [rows, 1, hidden] are a view of [rows, tokens, hidden]. `torch.matmul` makes one product of such a view only
    if the weights want gradients; else it makes one a row, and reads the weights for each: 249 of the 356 ms that 512
    rows of BLOOM-7b1 took on an H200.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))


def check_weights(model: str) -> None:
    """Checks that the folder `model` holds whole weights, and not those of a model that is split by rank.

    Raises:
        EngineError: they are split.
        ModelError: there are none, or some are missing.
    """
    if (split := split_folder.read(Path(model))) is not None:
        raise EngineError(
            f"{model} is split over {split.ranks} ranks, which only ds-inference and paged read, with --tp "
            f"{split.ranks}; give the model it was made from, {split.model}"
        )
    weight_files(Path(model))


def load(
    model: str,
    arguments: Mapping[str, Any],
    *,
    filled: bool = True,
    adapter: str = "",
    state_dict: Mapping[str, Any] | None = None,
) -> Any:
    """The model in folder `model`, in eval mode. `arguments` go to `from_pretrained`; those that are None do not.

    The LoRA adapter in the folder `adapter` is merged into its weights; "" is none.

    A folder with pickled weights alone is read by torch's weights_only loader, which runs no code of theirs. A hollow
    model's weights are made here, unless they are not wanted `filled` yet.

    Args:
        state_dict: the weights of a quantised checkpoint (`quantised.checkpoint`); None: they are widened.

    Raises:
        EngineError: it cannot be loaded, does not fit, or lacks weights, which would be random numbers.
        Died: another rank has gone, where ranks load together.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        with lora.merged_on_load(adapter):
            loaded, report = _load(model, given, state_dict)
    except (UserError, Died):
        raise
    except UnpicklingError as error:
        raise refused_pickle(Path(model)) from error
    except Exception as error:  # hundreds of architectures read damaged files, and each raises what it likes
        if device.is_out_of_memory(error):
            raise EngineError(
                f"the model in {model} does not fit into memory; use a smaller --dtype or more GPUs"
            ) from error
        # Where ranks load together, one may be gone; NCCL's errors have a type, gloo's have not.
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if lost and isinstance(error, RuntimeError):  # an OSError names files
            raise Died(f"another rank has gone while the ranks loaded together: {error}") from error
        why = explain_shapes(Path(model), error) or one_line(error)
        raise ModelError(f"the model in {model} cannot be loaded: {why}") from error
    check_report(model, loaded.config, report)
    if filled:
        random_weights.fill_hollow(model, loaded)
    return loaded.eval()


def _load(model: str, given: dict[str, Any], state_dict: Mapping[str, Any] | None) -> Any:
    """The model, and Transformers' report of what it has loaded."""
    config = read_config(model)
    given = architectures.attention_arguments(config) | given
    if state_dict is not None:
        return quantised.load(config, state_dict, given)
    if (checkpoint := quantised.find_checkpoint(Path(model), config)) is not None:
        return quantised.load_widened(config, checkpoint, given)
    return architectures.auto_class(config).from_pretrained(
        model, local_files_only=True, trust_remote_code=False, output_loading_info=True, **given
    )


@contextmanager
def refuse_model(config: Any, has_generated: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turns an error of the model's own code, in the first batch that it generates, into a ModelError.

    The next start would meet it again. Out of memory, a GPU that fails and ranks that are lost are no fault of the
    model, and leave as they are; so does any error once the model `has_generated` something.
    """
    try:
        yield
    except _OF_CODE as error:
        if has_generated():
            raise
        lost = isinstance(error, torch.distributed.DistError) or _OF_MACHINE.search(str(error))
        if lost or device.is_out_of_memory(error):
            raise
        name = type(error).__name__
        raise ModelError(
            f"Transformers cannot generate with the model in {config.name_or_path} ({config.model_type}): {name}: "
            f"{one_line(error).removeprefix(f'{name}: ')}. Choose another model"
        ) from error


def refused_pickle(folder: Path) -> ModelError:
    """Of torch's own words about such a file, the advice to load it all the same is left out."""
    return ModelError(
        f"the model in {folder} cannot be loaded: its pytorch_model*.bin holds more than tensors, or is damaged. Such "
        "a file can run code as it is read, so this one is not; take a model with safetensors"
    )


def own_dtype(config: Any) -> torch.dtype:
    """The type that a model's config names; float32 if it names none."""
    dtype: torch.dtype = config.get_text_config().dtype or torch.float32
    return dtype


def automatic_dtype(config: Any, *, on_gpu: bool | None = None) -> torch.dtype:
    """What `--dtype auto` is: on a GPU the config's own type, on a CPU float32 if this one is slow in the other.

    Args:
        on_gpu: the model will be; None: if there is one here.
    """
    own = own_dtype(config)
    if on_gpu is None:
        on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > 0
    if on_gpu or own not in (torch.bfloat16, torch.float16) or device.is_fast_in(own):
        return own
    return torch.float32


def name_of(dtype: torch.dtype) -> str:
    """As `--dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def floating_dtype(name: str, config: Any, *, on_gpu: bool | None = None) -> torch.dtype:
    """The torch type of `--dtype`, where only those with a point will do.

    Args:
        on_gpu: as `automatic_dtype` takes it.

    Raises:
        EngineError: it is a quantised one.
    """
    if name == "auto":
        return automatic_dtype(config, on_gpu=on_gpu)
    if name not in FLOATING:
        raise EngineError(f"this engine has no dtype {name}; choose auto, {', '.join(FLOATING)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def device_of(world: World) -> torch.device:
    """Where this rank computes: its own GPU; where there is none, the CPU, whose cores the ranks of a host share.

    Raises:
        EngineError: there are fewer GPUs than ranks.
    """
    if torch.cuda.is_available() and torch.cuda.device_count():
        return torch.device("cuda", gpu_of(world))
    if world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, device.cores() // world.local_size))
    return torch.device("cpu")


def gpu_of(world: World) -> int:
    """The number of this rank's GPU. Where the launcher shows each rank a GPU of its own, that one is number 0 for all.

    Raises:
        EngineError: there are fewer GPUs than ranks.
    """
    own = torch.cuda.device_count() == 1 and "BATCHGEN_STARTER" not in os.environ  # `--ranks` shows all to all
    index = 0 if own else world.local_rank
    check_gpu(index, f"local rank {world.local_rank}")
    return index


def check_gpu(index: int, who: str) -> None:
    """Raises EngineError if there is no GPU of that number; `who` asked for it."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"{who} asks for a GPU, but torch {torch.__version__} sees none here; check the driver, or leave it out"
        )
    if index >= torch.cuda.device_count():
        raise EngineError(f"{who} asks for GPU {index}, but there are only {torch.cuda.device_count()}, counted from 0")
