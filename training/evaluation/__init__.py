"""The paper's evaluations, one command each: `python -m training.evaluation NAME`."""
