"""Space in tables and stores: graphs, statistics and operations across elements."""
