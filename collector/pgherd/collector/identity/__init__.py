"""Who is who: the herd's own CA, join tokens, enrolment and renewal, revocation, and the check of every RPC."""
