"""The benchmark: what a round costs here, and what it costs with the tools everyone has, on the same work."""
