"""What stays in memory: slots, policies, the budget."""
