"""The lowest layer: store protocol, settings, logging, errors. Imports nothing else of the package."""
