"""Cell types of a slide: clusters of its cells with their markers, types by markers, types from a reference.

`clusters`, `phenotypes` and `transfer` work on tables in memory, `stage` on files. Each slide is looked at by itself.
"""
