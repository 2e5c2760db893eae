"""The pool that answers requests: load balancing, circuit breaker, in-flight limits, router."""
