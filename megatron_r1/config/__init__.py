"""Configuration: one dataclass per section, and the strict way from YAML and overrides onto them. Imports no torch."""
