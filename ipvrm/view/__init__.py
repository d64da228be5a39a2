"""What a person looks at: a scored trace, runs, this machine."""
