"""Where an adapter starts other than at random: spectra of the weights, data, what quantisation took."""
