"""Image classification: pictures and labels in, an adapter and a head for each set of labels out."""
