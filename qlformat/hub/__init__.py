"""Publishing to a hub and fetching from it: one commit that shows a new state as a whole, and nothing unverified."""
