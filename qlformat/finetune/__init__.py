"""Fine-tuning of LoRA adapters on a 4-bit base: data, options, training, and what is left on disk."""
