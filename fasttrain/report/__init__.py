"""Pages and plots about finished runs."""
