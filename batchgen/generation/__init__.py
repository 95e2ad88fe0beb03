"""What the engines share while they choose tokens."""
