"""The policy and its reference: batches, log-probs, frozen log-probs."""
