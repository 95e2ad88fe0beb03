"""The values that cross modules. Standard library only, no I/O.

A `Row` is one input row as a format read it; `prompts` turns it into a `Prompt` or, if something is wrong with it,
into a failed `Generation`. An engine turns prompts into a `Batch` of generations; `checkpoint` writes it and keeps a
`BatchRecord`, the proof that the batch is finished.

Once made, nobody changes these values. Those that a run makes for every row are not marked frozen all the same: making
a frozen one takes three times as long, which is felt with a million rows.
"""

from batchgen.types.batches import Batch, BatchRecord
from batchgen.types.outcomes import CANNOT_WRITE, MACHINE_ERRORS, TOO_MANY_FAILED, ExitCode, FinishReason, UserError
from batchgen.types.params import (
    FIT,
    MOST_ALTERNATIVES,
    MOST_SAMPLES,
    PARAMS,
    Constraint,
    ConstraintKind,
    SamplingParams,
)
from batchgen.types.rows import (
    Alternative,
    Details,
    Generation,
    Markup,
    Prompt,
    Row,
    RowError,
    Thinking,
    Tokens,
)
from batchgen.types.shard import WHOLE, Shard

__all__ = [
    "CANNOT_WRITE",
    "FIT",
    "MACHINE_ERRORS",
    "MOST_ALTERNATIVES",
    "MOST_SAMPLES",
    "PARAMS",
    "TOO_MANY_FAILED",
    "WHOLE",
    "Alternative",
    "Batch",
    "BatchRecord",
    "Constraint",
    "ConstraintKind",
    "Details",
    "ExitCode",
    "FinishReason",
    "Generation",
    "Markup",
    "Prompt",
    "Row",
    "RowError",
    "SamplingParams",
    "Shard",
    "Thinking",
    "Tokens",
    "UserError",
]
