"""What an agent does: tasks, rollouts, and the statistics of outcomes."""
