"""HTML reports: pages, plots, pictures, trees."""
