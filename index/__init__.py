"""Vectors on disk and in memory: SQLite holds the truth, FAISS answers the searches."""
