"""Any image dataset as images and labels."""
