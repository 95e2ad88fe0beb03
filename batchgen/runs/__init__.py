"""One run from its start to its end. `flow` shows the whole of it."""
