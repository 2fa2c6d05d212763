"""What domains say: shares, neighbours, genes, pathways and differences between conditions.

All functions take one or several AnnData tables, or `read_tables` of files, which holds one in memory at a time.
"""

from cellquilt.domains.analysis.architecture import Architecture, architecture
from cellquilt.domains.analysis.cohort import CohortAnalysis, analyse_cohort
from cellquilt.domains.analysis.conditions import compare_conditions
from cellquilt.domains.analysis.dendrogram import Dendrogram, dendrogram
from cellquilt.domains.analysis.genes import (
    GeneStatistics,
    gene_statistics,
    spatially_variable_genes,
    variable_genes_by_domain,
)
from cellquilt.domains.analysis.pathways import Pathways, pathway_scores, read_gene_sets
from cellquilt.domains.analysis.shares import proportions
from cellquilt.spatial.files import TableFiles, check_output, read_tables, write_table

__all__ = [
    "Architecture",
    "CohortAnalysis",
    "Dendrogram",
    "GeneStatistics",
    "Pathways",
    "TableFiles",
    "analyse_cohort",
    "architecture",
    "check_output",
    "compare_conditions",
    "dendrogram",
    "gene_statistics",
    "pathway_scores",
    "proportions",
    "read_gene_sets",
    "read_tables",
    "spatially_variable_genes",
    "variable_genes_by_domain",
    "write_table",
]
