"""Results as pages for a browser: one file each, with nothing to fetch and nothing that runs."""
