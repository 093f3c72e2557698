"""A small self-hosted hub: the Hugging Face Hub's HTTP API for the unmodified clients, on one machine's disk."""
