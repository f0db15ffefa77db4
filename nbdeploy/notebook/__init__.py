"""What a notebook adds to `deploy()`: the `%deploy` line, the sample from its last call, progress and the card."""
