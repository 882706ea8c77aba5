"""Text to batches: tokenizer training, corpora, packing, masking and GLUE tasks."""
