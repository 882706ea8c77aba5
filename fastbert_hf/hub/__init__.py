"""To and from the Hugging Face Hub: push, pull, convert, and the model card."""
