"""Space in tables and stores: graphs, statistics, and operations across elements; see docs/spatial.md."""

from cellquilt.spatial.alignment import Alignment, align, fit_landmarks, read_landmarks
from cellquilt.spatial.cohort import CohortStatistics, cohort_statistics
from cellquilt.spatial.cooccurrence import CoOccurrence
from cellquilt.spatial.distances import Distances
from cellquilt.spatial.enrichment import Enrichment
from cellquilt.spatial.exchange import read_geojson, write_geojson
from cellquilt.spatial.measures import (
    co_occurrence,
    group_distances,
    neighbourhood_enrichment,
    niche_geometry,
    niche_network,
)
from cellquilt.spatial.network import Network
from cellquilt.spatial.niches import Niches
from cellquilt.spatial.operations import region_statistics, sjoin, transfer_labels
from cellquilt.spatial.summary import SlideStatistics, slide_statistics
from cellquilt.spatial.tables import spatial_neighbors

__all__ = [
    "Alignment",
    "CoOccurrence",
    "CohortStatistics",
    "Distances",
    "Enrichment",
    "Network",
    "Niches",
    "SlideStatistics",
    "align",
    "co_occurrence",
    "cohort_statistics",
    "fit_landmarks",
    "group_distances",
    "neighbourhood_enrichment",
    "niche_geometry",
    "niche_network",
    "read_geojson",
    "read_landmarks",
    "region_statistics",
    "sjoin",
    "slide_statistics",
    "spatial_neighbors",
    "transfer_labels",
    "write_geojson",
]
