"""Generation: engines behind one protocol, weight sync, the records of requests and samples, and their journal."""
