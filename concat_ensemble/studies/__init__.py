"""What is measured with probes, and the results files."""
