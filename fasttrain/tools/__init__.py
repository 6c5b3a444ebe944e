"""What the command line offers beside training: each module is one command."""
