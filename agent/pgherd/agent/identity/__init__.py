"""The agent's identity in the herd: joining once, its files, renewal."""
