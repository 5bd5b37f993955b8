"""What several experiments share: flags, command line, jobs, the published network."""
