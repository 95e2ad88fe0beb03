"""What fits into which machine, how long it takes there, and which engine is therefore the best choice."""
