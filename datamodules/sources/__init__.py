"""Sources of recommendation data, of knowledge graphs, of facts and of texts: one file for each source or format."""
