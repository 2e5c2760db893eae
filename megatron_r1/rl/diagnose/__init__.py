"""Why an engine's log-probabilities are not the trainer's: a saved batch, held against one suspicion after another."""
