"""What an adapter trains beside A and B in a place: biases, rows of a table."""
