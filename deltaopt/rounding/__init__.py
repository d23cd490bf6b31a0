"""Writing weights: one sum in float32 or float64, rounded once into the dtype of W."""
