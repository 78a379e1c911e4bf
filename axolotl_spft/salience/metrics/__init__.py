"""The salience metrics: a file each, with what it needs and its score."""
