"""The way of someone who meets the project for the first time, from an empty folder to an answer of their model."""
