"""SGLang as the rollout engine: servers, client, engine, and what SGLang needs on machines without a GPU."""
