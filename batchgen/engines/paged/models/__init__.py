"""Models of Transformers, patched to attend over pages: which are covered, and how.

A model is covered by what it asks of attention, not by its name. The way of a model:

1. `coverage.check` reads its config, and refuses what pages of keys and values cannot hold: recurrent states, say.
2. `trial.check` builds a small random model of that config, patches it, and compares its logits with Transformers' own.
   What our attention does not do as the model wants it is refused here, before any weight is read.
3. `patching.patch` gives the attention of the loaded model to `attention.attend`, its experts to `experts`, and its
   linear layers to `linear`. Most models ask Transformers' attention interface for a function (`interface`); those
   that do not have a module of their own here: `bloom`, `falcon`, `mpt`.
"""

from batchgen.engines.paged.models.coverage import check, check_dtype, covers
from batchgen.engines.paged.models.patching import PatchedModel, patch

__all__ = ["PatchedModel", "check", "check_dtype", "covers", "patch"]
