"""Readers: one module a machine, found by the technology's name; `base` drives them."""

from cellquilt.readers.base import Reader, convert_slide, reader_of

__all__ = ["Reader", "convert_slide", "reader_of"]
