"""Training of reward models and policies: configurations, loops, checkpoints and resuming."""
