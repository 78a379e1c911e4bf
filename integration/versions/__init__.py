"""What the project was tested with: environments of old and new releases, and their record."""
