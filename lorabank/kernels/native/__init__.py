"""Products and attention on a CPU in C, compiled at first use where there is a compiler (docs/decisions/009)."""
