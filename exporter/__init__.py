"""pocket-exporter: one compressed transformer, every phone runtime, each artifact proved."""
