"""Families of models with the features of their real configs, and what `paged` owes each: see `contract`."""
