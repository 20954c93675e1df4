"""What is adapted: built by one factory per kind of model."""
