"""Commands, from the operator's request to the agent's result, and what the herd's agents say of themselves."""
