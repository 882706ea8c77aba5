"""Fine-tuning on GLUE and on own data: one run, many runs, the table."""
