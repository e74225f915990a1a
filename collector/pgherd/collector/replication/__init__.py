"""How far standbys are behind, judged by the collector from positions alone."""
