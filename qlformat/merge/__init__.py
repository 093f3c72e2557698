"""Put adapters into a base, weight by weight, and prove what was kept of them (`qlf merge`)."""
