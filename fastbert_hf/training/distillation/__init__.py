"""Feed-forward layers from the layers of a trained model: a start from data, and the fit of one layer to another."""
