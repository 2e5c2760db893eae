"""Weight synchronization: what is sent to the servers, in which buckets, by which sender, and the strategies."""
