"""Members of a sweep over sampling, compared: tables, fronts and plots."""
