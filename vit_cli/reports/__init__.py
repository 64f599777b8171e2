"""Reports: what is known of a model after training or evaluation, as tables, rows and a page."""
