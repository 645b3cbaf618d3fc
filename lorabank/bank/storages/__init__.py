"""How a frozen base may store its weights: plain, fp8, NF4."""
