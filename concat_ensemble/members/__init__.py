"""Making an ensemble out of members that come from anywhere."""
