"""The policy loss: ratios, policy terms, aggregation, KL penalty, importance weights."""
