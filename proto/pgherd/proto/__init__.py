"""What agent and collector mean together: wire messages, commands, errors, LSNs, samples. No I/O."""
