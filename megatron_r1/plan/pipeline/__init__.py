"""Pipeline schedules, simulated event by event, and their pictures."""
