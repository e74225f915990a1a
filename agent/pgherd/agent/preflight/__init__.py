"""`pgherd-agent check`: what keeps a cluster from being sampled, backed up, restored or promoted."""
