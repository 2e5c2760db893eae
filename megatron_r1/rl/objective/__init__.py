"""The policy loss: policy terms, aggregation, KL penalty, importance weights."""
