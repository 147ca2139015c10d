"""`make long-context`: what tools/measure_long_context.py measures on which model, and the page that it writes."""
