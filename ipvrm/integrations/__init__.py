"""Other people's trainers with ipvrm's reward models and losses; each module needs its own extra."""
