"""Pretraining and fine-tuning on the Transformers Trainer."""
