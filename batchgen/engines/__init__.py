"""Everything here is an engine; the file name is its name."""
