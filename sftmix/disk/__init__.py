"""What is on the disk: files written whole or not at all, places that names stand for, tables, and the cache."""
