"""From series to notifications: rule evaluation, its durable state, the outbox, and what is heard of the herd."""
