"""Pretraining: data, model, budget, the run itself, and its reports."""
