"""Looking at masks and adapters: figures, tables, pictures and a page, from their files alone."""
