"""The paper's experiments at desk scale."""
