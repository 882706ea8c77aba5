"""The earlier place of `fastbert_hf.training.start_from_data`."""

from fastbert_hf.training.start_from_data import DenseWeights, initialize_from_data, initialize_model_from_data

__all__ = ["DenseWeights", "initialize_from_data", "initialize_model_from_data"]
